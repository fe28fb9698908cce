"""The report of a run: its HTML by reading it, the page itself in a headless browser where there is one."""

import base64
import itertools
import json
import math
import re
import shutil
from html import unescape
from importlib import resources
from pathlib import Path

import pytest
import yaml
from _models import write_model, write_rows

import opsd.report.token_view
from opsd.cli import main
from opsd.errors import ConfigError
from opsd.report import CHARTS, MAX_POINTS, read_run, render, thinned, write_report

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>&amp;\u2028{{script}}"


def append(path, *records):
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def token(text, student, teacher, divergence, dominant="x"):
    return {
        "text": text,
        "id": 5,
        "p_student": student,
        "p_teacher": teacher,
        "divergence": divergence,
        "alternatives": [[text, student, teacher], [dominant, 0.1, 0.7]],
        "dominant": [dominant, 0.2, 0.1, 0.7],
    }


VIEW = [
    token("Four", 0.91, 0.88, 0.002),
    token(" is", 0.62, 0.031, 0.31, " makes"),
    token("\n", 0.2, 0.9, 0.11),
    token("", 0.5, 0.5, 0.0),
    token("é", 0.5, 2e-5, 0.6),
    token(HOSTILE, 0.4, 0.4, 0.09, HOSTILE),
]


def pass_at(k, value):
    return {"k": k, "value": value, "low": value - 0.05, "high": value + 0.05}


def write_run(path: Path, steps: int = 12, view=VIEW, **changes) -> Path:
    """A run directory like a real one; `changes` are section__option=value of its configuration."""
    path.mkdir()
    config = {
        "model": {"path": "hub/some-model", "dtype": "float32"},
        "data": {"train": "/somewhere/far/away/train.jsonl"},
        "objective": {"form": "full", "beta": 0.5},
        "optim": {"lr": 1e-4, "steps": steps, "batch_size": 8},
        "run": {"dir": str(path), "seed": 0},
    }
    for name, value in changes.items():
        section, _, option = name.partition("__")
        config[section][option] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    began = {"id": "x", "created": "2026-03-04T05:06:07+00:00", "packages": {"torch": "2.13.0", "opsd": "0.1.0"}}
    (path / "run.json").write_text(json.dumps(began))
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 1 / step,
            "divergence": 1.5 / step,
            "student_entropy": 0.5,
            "teacher_entropy": 0.25,
            "entry_clipped": 0.0,
            "rollout_length": 30.5,
            "truncated": 0.125,
            "grad_norm": 2.0,
            "lr": 1e-4,
            "tokens": 100,
            "tokens_per_second": 50.0,
            "seconds": 2.0,
            "seconds_rollout": 1.0,
            "seconds_loss": 0.75,
            "peak_memory_bytes": 3 * 2**29,
        }
        append(path / "metrics.jsonl", record)
        if step % max(1, steps // 3) == 0:
            sample = {"step": step, "source": "train.jsonl:4", "problem": f"problem at {step}", "tokens": 6}
            rollout = "".join(entry["text"] for entry in view or [{"text": f"plain {HOSTILE}"}])
            more = {"view": view} if view else {}
            append(path / "samples.jsonl", {**sample, "rollout": rollout, "truncated": False, **more})
    for step, name, accuracy in (
        (0, "base", 0.25),
        (0, "teacher", 0.875),
        (6, "step 6", 0.5),
        (steps, "trained", 0.75),
    ):
        interval = {"low": accuracy - 0.1, "high": accuracy + 0.1, "problems": 40, "samples": 4, "mean_length": 31.5}
        extra = {"truncated": 0.0, "pass_at": [pass_at(1, accuracy), pass_at(4, accuracy + 0.0625)]}
        append(path / "evaluations.jsonl", {"step": step, "name": name, "accuracy": accuracy, **interval, **extra})
    (path / "summary.json").write_text(json.dumps({"steps": steps, "seconds": 40.0, "tokens": 100 * steps}))
    return path


def payload(html):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S)))


# Without a browser


def test_the_command_says_where_the_page_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", objective__beta=1.0)
    assert main(["report", str(a)]) == 0
    assert str(a / "report.html") in capsys.readouterr().out
    assert (a / "report.html").exists()
    assert main(["report", str(a), str(b)]) == 0
    assert "opsd-report.html" in capsys.readouterr().out
    assert (tmp_path / "opsd-report.html").exists()
    assert main(["report", str(a), "--output", str(tmp_path / "x.html"), "--samples", "0"]) == 0
    assert payload((tmp_path / "x.html").read_text())["samples"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: there is no such run directory"),
        (["empty"], "empty: not a run directory"),
        (["begun"], "begun: no metrics.jsonl"),
        (["broken"], "broken: metrics.jsonl holds no step"),
        (["file"], "file: not a directory"),
        (["good", "--output", "missing/x.html"], "missing/x.html: cannot be written"),
        (["good", "--samples", "-1"], "--samples"),
        (["good", "--optim.lr", "1"], "--optim.lr"),
    ],
)
def test_what_cannot_be_reported_is_named(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "begun", "broken"):
        Path(name).mkdir()
    Path("begun/config.yaml").write_text("{}")
    Path("broken/metrics.jsonl").write_text('{"step": 1, "lo\n[1]\n{"loss": 1}\n')
    Path("file").write_text("")
    write_run(Path("good"))
    assert main(["report", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_figures_of_the_run_are_in_the_text(tmp_path):
    text = text_of(write_report([write_run(tmp_path / "one")]).read_text())
    assert "Finished after 12 steps" in text
    for figure in (
        "75.0%",
        "25.0%",
        "87.5%",
        "65.0 to 85.0%",
        "pass@4",
        "81.2% (76.2 to 86.2%)",
        "1.50 GiB",
        "hub/some-model",
    ):
        assert figure in text
    assert "…/away/train.jsonl" in text
    assert "04 March 2026, 05:06 UTC" in text
    assert "torch 2.13.0, opsd 0.1.0" in text
    assert "0.08333" in text  # the last loss
    assert re.search(r"rollout 12\.0 50\.0% 1 s", text)
    assert re.search(r"other 3\.0 12\.5%", text)
    assert "16 s more for loading" in text
    assert "Zero at every step, and so not drawn: clipped tokens." in text


def test_a_running_half_written_run_is_reported_with_what_is_missing(tmp_path):
    run = write_run(tmp_path / "one", optim__steps=500)
    for name in ("summary.json", "evaluations.jsonl", "config.yaml"):
        (run / name).unlink()
    append(run / "metrics.jsonl", {"step": 13, "loss": float("nan"), "grad_norm": None, "warnings": ["short <b>"]})
    append(run / "metrics.jsonl", {"step": 12, "loss": 7.0}, {"no": "step"})
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'nonsense\n{"step": 14, "note": "\xe2\x82')
    html = write_report([run]).read_text()
    text = text_of(html)
    for note in (
        "summary.json is missing: the run is not finished",
        "evaluations.jsonl is missing",
        "config.yaml is missing",
        "the last line of metrics.jsonl is half written",
        "metrics.jsonl: 1 lines are no records",
        "metrics.jsonl: 1 records without step are left out",
        "short &lt;b&gt; step 13",
        "No evaluation was recorded",
        "Not finished: 13 steps",
    ):
        assert note in text
    points = payload(html)["charts"][0][0]["points"]
    assert points[-2:] == [[12, 7.0], [13, None]]  # the later record of a step that was run again


def test_a_single_step_without_anything_else(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    append(run / "metrics.jsonl", {"step": 1, "loss": 0.5})
    html = write_report([run]).read_text()
    assert payload(html)["charts"] == [[{"run": 0, "second": False, "label": "loss", "points": [[1, 0.5]]}]]
    assert re.findall(r"<h3>(.*?)</h3><p class=\"unit\">(.*?)</p>", html) == [("Loss", "nats per token")]
    assert "Token view" not in text_of(html)


def test_thousands_of_steps_keep_their_extremes_and_gaps():
    points = [(i, float(i % 7)) for i in range(20_000)]
    points[1234] = (1234, 99.0)
    points[4321] = (4321, -99.0)
    points[9000] = (9000, None)
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 3
    assert {points[0], points[1234], points[4321], points[9000], points[-1]} <= set(kept)
    assert kept == sorted(kept, key=lambda p: p[0])
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_many_steps_are_said_to_be_thinned_and_samples_left_out(tmp_path):
    run = write_run(tmp_path / "one", steps=1200)
    append(run / "samples.jsonl", *[{"step": 1200 + i, "problem": "", "rollout": f"r{i}"} for i in range(100)])
    html = render([read_run(run)], max_samples=10)
    assert "1,200 steps are drawn as 800 points" in text_of(html)
    assert "one: 10 of 103 rollouts are here; left out are some of steps 800" in text_of(html)
    shown = payload(html)["samples"]
    assert len(shown) == 10
    assert (shown[0]["step"], shown[-1]["step"]) == (400, 1299)


def test_long_rollouts_are_cut_and_fewer(tmp_path, monkeypatch):
    run = write_run(tmp_path / "one", steps=30)
    monkeypatch.setattr(opsd.report.token_view, "MAX_TOKENS", 4)
    monkeypatch.setattr(opsd.report.token_view, "MAX_PAGE_TOKENS", 8)
    html = render([read_run(run)])
    assert [(len(sample["view"]), sample["of"]) for sample in payload(html)["samples"]] == [(4, 6), (4, 6)]
    assert "the first 4 tokens are shown" in text_of(html)
    assert "2 of 3 rollouts are here" in text_of(html)


def test_nothing_a_run_wrote_leaves_its_place(tmp_path):
    run = write_run(tmp_path / "one", model__path=HOSTILE)
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 3, "problem": "\\ud83d", "rollout": "\\u0000lone \\udc00"}\n')
    append(
        run / "metrics.jsonl",
        {"step": 13, "loss": 1.0, HOSTILE: 3.0, "seconds_" + HOSTILE: 1.0, "warnings": [HOSTILE, "lone \udc00"]},
    )
    append(run / "evaluations.jsonl", {"step": 13, "name": HOSTILE, "accuracy": 0.5, "pass_at": {HOSTILE: 0.5}})
    html = write_report([run]).read_text(encoding="utf-8")
    assert html.count("<script") == html.count("</script") == 2
    assert "<img" not in html
    assert "lone ?" in html  # half a character, which no file of text can hold
    assert payload(html)["samples"][0]["view"][5][0] == HOSTILE
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html
    assert "default-src 'none'" in unescape(html)


def test_several_runs_show_the_options_that_differ(tmp_path):
    (tmp_path / "x").mkdir()
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "x" / "a", objective__beta=1.0, optim__lr=3e-4)]
    html = write_report(runs, tmp_path / "r.html").read_text()
    assert payload(html)["runs"] == [f"{tmp_path.name}/a", "x/a"]
    table = re.search(r"<caption>Options that differ</caption>.*?</table>", html, re.S)[0]
    assert "objective.beta" in table
    assert "optim.lr" in table
    assert "run.seed" not in table
    assert "run.dir" not in table
    same = write_report([runs[0], runs[0]], tmp_path / "r.html").read_text()
    assert "The runs have the same options" in same


def test_every_chart_is_explained(tmp_path):
    run = write_run(tmp_path / "one")
    append(run / "metrics.jsonl", {"step": 13} | {name: 1.0 for chart in CHARTS for name in chart.metrics})
    html = write_report([run]).read_text()
    figures = re.findall(r'<figure class="chart" data-chart=.*?</figure>', html, re.S)
    assert len(figures) == len(CHARTS)
    for chart, figure in zip(CHARTS, figures, strict=True):
        assert chart.note.endswith(".")
        assert chart.title in unescape(text_of(figure))
        assert chart.note in unescape(text_of(figure))


def test_reading_a_directory_without_steps_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        read_run(tmp_path)


# In a browser


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(names)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def one_page(tmp_path_factory):
    return write_report([write_run(tmp_path_factory.mktemp("report") / "one")])


@pytest.fixture(scope="module")
def two_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "a-run-with-quite-a-long-name"), write_run(folder / "two", objective__beta=1.0)]
    return write_report(runs, folder / "r.html")


class Opened:
    """A page, with what its browser complained about and what it asked the network for."""

    def __init__(self, browser, file, scheme="light", width=1200):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.errors, self.requests = [], []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.absolute().as_uri())
        self.page.wait_for_function("document.querySelector('.plot > svg') !== null")

    def __enter__(self):
        return self

    def widths(self, *widths):
        """Each width of the screen in turn, the page being as wide."""
        for width in widths:
            self.page.set_viewport_size({"width": width, "height": 900})
            yield width

    def __exit__(self, kind, *_):
        hacked = self.page.evaluate("window.hacked")
        url = self.page.url.split("#")[0]
        self.context.close()
        if kind is None:
            assert self.errors == []
            assert self.requests == [url]
            assert hacked is None

    def card(self):
        card = self.page.locator(".card")
        return {
            "word": card.locator(".word").inner_text(),
            "student": card.locator("[data-p=student]").inner_text(),
            "teacher": card.locator("[data-p=teacher]").inner_text(),
            "divergence": card.locator("[data-divergence]").inner_text(),
            "dominant": card.locator("[data-dominant]").inner_text(),
            "place": card.locator(".place").inner_text().split("\n")[0],
        }


IS = {
    "word": "␣is",
    "student": "0.620",
    "teacher": "0.031",
    "divergence": "0.310",
    "dominant": "␣makes",
    "place": "token 2 of 6",
}


def test_hovering_a_token_shows_its_numbers(one_page, browser):
    with Opened(browser, one_page) as opened:
        opened.page.locator(".tokens .tok").nth(1).hover()
        assert opened.card() == IS
        assert opened.page.locator(".card .verdict").inner_text() == "The teacher likes it less"
        rows = opened.page.locator(".card tbody tr")
        assert rows.count() == 2
        assert rows.nth(1).inner_text().split() == ["␣makes", "0.100", "0.700"]
        width = "e => e.getBoundingClientRect().width / e.parentElement.getBoundingClientRect().width"
        assert rows.nth(1).locator(".meter.teacher i").evaluate(width) == pytest.approx(0.7, abs=0.02)


def test_colour_says_which_way_and_how_much(one_page, browser):
    with Opened(browser, one_page) as opened:
        tokens = opened.page.locator(".tokens .tok")
        kinds = [set(tokens.nth(i).get_attribute("class").split()) & {"less", "more", "same"} for i in range(6)]
        assert kinds == [{"same"}, {"less"}, {"more"}, {"same"}, {"less"}, {"same"}]
        colours = [tokens.nth(i).evaluate("e => getComputedStyle(e).backgroundColor") for i in range(6)]
        assert len(set(colours)) == 6
        alpha = [float(re.search(r"/ ([\d.e-]+)\)", colour)[1]) for colour in (colours[1], colours[4])]
        assert alpha[0] == pytest.approx(0.6 * (0.31 / 0.5) ** 0.5, abs=0.01)
        assert alpha[1] == pytest.approx(0.6, abs=0.01)
        assert opened.page.locator(".tokens").evaluate("e => e.textContent.replaceAll('↵', '')") == "".join(
            entry["text"] or "·" for entry in VIEW
        )


def test_the_keyboard_reaches_every_token(one_page, browser):
    with Opened(browser, one_page) as opened:
        page = opened.page
        assert page.locator(".tokens [tabindex='0']").count() == 1  # one stop, arrow keys within
        page.get_by_role("button", name="Next token with a divergence").focus()
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.className").startswith("tok"):
                break
        assert opened.card() == IS  # the first disagreement
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert opened.card() == IS
        label = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert label == "␣is: student 0.620, teacher 0.031, divergence 0.310 nats. The teacher likes it less."
        assert page.locator(".tokens [aria-selected='true']").count() == 1
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        assert opened.card()["word"] == "Four"
        page.keyboard.press("ArrowLeft")
        assert opened.card()["word"] == "Four"
        page.keyboard.press("End")
        assert opened.card()["place"] == "token 6 of 6"
        page.keyboard.press("ArrowUp")
        assert opened.card()["place"] != "token 6 of 6"
        page.get_by_role("button", name="Next token with a divergence").click()
        assert float(opened.card()["divergence"]) >= 0.05


def test_hostile_text_is_only_text(tmp_path, browser):
    run = write_run(tmp_path / "one", model__path=HOSTILE)
    append(
        run / "metrics.jsonl", {"step": 13, "loss": 1.0, HOSTILE: 3.0, "seconds_" + HOSTILE: 1.0, "warnings": [HOSTILE]}
    )
    append(run / "samples.jsonl", {"step": 13, "source": HOSTILE, "problem": HOSTILE, "rollout": HOSTILE})
    with Opened(browser, write_report([run])) as opened:
        page = opened.page
        page.locator(".tokens .tok").nth(5).hover()
        assert opened.card()["word"] == HOSTILE.replace(" ", "␣")
        page.locator("#pick-sample").select_option("3")
        assert page.locator(".tokens").inner_text().replace("\u2028", "") == HOSTILE.replace("\u2028", "")
        assert page.locator(".problem").text_content() == HOSTILE
        assert not page.locator(".card").is_visible()
        assert page.locator("img").count() == 0


def test_light_and_dark_differ_and_the_button_changes_them(one_page, browser):
    look = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    seen = {}
    for scheme in ("light", "dark"):
        with Opened(browser, one_page, scheme) as opened:
            seen[scheme] = opened.page.evaluate(look)
            opened.page.locator("#theme").click()
            seen[f"not {scheme}"] = opened.page.evaluate(look)
            opened.page.emulate_media(media="print")
            assert opened.page.evaluate(look) == seen["light" if scheme == "light" else "not dark"]
    assert seen["light"] == seen["not dark"] != seen["dark"] == seen["not light"]


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = (colours) => {
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => v / 255).map(v => (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4));
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const poor = [];
  for (const e of document.querySelectorAll('main *, nav *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length) continue;
    const behind = [];
    for (let at = e; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const back = rgb(['white', ...behind]);
    const style = getComputedStyle(e);
    const front = rgb([`rgb(${back})`, e instanceof SVGElement ? style.fill : style.color]);
    const [a, b] = [luminance(front), luminance(back)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) poor.push([e.tagName, e.className, (a + .05) / (b + .05)]);
  }
  return poor;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_has_contrast(two_page, browser, scheme):
    with Opened(browser, two_page, scheme) as opened:
        assert opened.page.evaluate(CONTRAST) == []


def test_nothing_is_wider_than_the_screen(two_page, browser):
    with Opened(browser, two_page) as opened:
        for width in opened.widths(340, 390, 1200):
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


BOX = "e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }"


def boxes(locator):
    return locator.evaluate_all(f"all => all.map({BOX})")


def evaluated(path, base, teacher, trained, wide=0.05):
    """A run with these accuracies, each in the middle of an interval of twice `wide`, as far as there is room."""
    run = write_run(path)
    (run / "evaluations.jsonl").unlink()
    for step, name, accuracy in ((0, "base", base), (0, "teacher", teacher), (12, "trained", trained)):
        interval = {"low": max(0.0, accuracy - wide), "high": min(1.0, accuracy + wide)}
        append(run / "evaluations.jsonl", {"step": step, "name": name, "accuracy": accuracy, **interval})
    return run


@pytest.mark.parametrize("accuracies", [
    [(0.0, 0.0, 0.0)], [(1.0, 1.0, 1.0)], [(0.5, 0.5, 0.5)], [(0.31, 0.3, 0.3)], [(0.1, 0.9, 0.5)],
    [(0.3 + n / 50, 0.4 + n / 50, 0.5) for n in range(4)], [(n / 90, 1 - n / 90, 0.5) for n in range(10)],
])  # fmt: skip
def test_the_labels_of_teacher_and_base_never_overlap(tmp_path, browser, accuracies):
    runs = [evaluated(tmp_path / str(n), *values) for n, values in enumerate(accuracies)]
    with Opened(browser, write_report(runs, tmp_path / "r.html")) as opened:
        labels = opened.page.locator("[data-accuracy] .note")
        assert {"teacher", "base"} <= set(labels.all_text_contents())
        for _ in opened.widths(390, 1200):
            (plot,) = boxes(opened.page.locator("[data-accuracy] .plot > svg"))
            drawn = max(box[2] for box in boxes(opened.page.locator("[data-accuracy] .point")))
            found = sorted(boxes(labels), key=lambda box: box[1])
            for above, below in itertools.pairwise(found):
                assert above[3] <= below[1] + 1
            for left, top, right, bottom in found:
                assert plot[0] <= left < right <= plot[2]
                assert plot[1] <= top + 1 < bottom <= plot[3]
                assert left >= drawn  # beside what is drawn, not over it


@pytest.mark.parametrize(("values", "wide", "ticks"), [
    ((0.0, 0.0, 0.0), 0.161, [0, 50]),  # no right answer of 20
    ((0.5, 0.52, 0.51), 0.2, [0, 100]),
    ((0.42, 0.5, 0.47), 0.04, [35, 55]),  # a narrow one is not lost in an axis of 0 to 100
    ((0.9, 1.0, 1.0), 0.02, [88, 100]),  # nothing above 100
])  # fmt: skip
def test_no_interval_fills_the_plot_of_the_accuracies(tmp_path, browser, values, wide, ticks):
    with Opened(browser, write_report([evaluated(tmp_path / "one", *values, wide=wide)])) as opened:
        svg = opened.page.locator("[data-accuracy] .plot > svg")
        ((_, top, _, bottom),) = boxes(svg)
        ((_, high, _, low),) = boxes(svg.locator(".band"))
        assert 0 < low - high <= 0.4 * (bottom - top)
        marks = [float(text) for text in svg.locator(".tick.y").all_text_contents()]
        assert [marks[0], marks[-1]] == pytest.approx(ticks, abs=3)
        assert marks[-1] <= 100


def test_a_teacher_that_runs_share_is_drawn_once(tmp_path, browser):
    runs = [evaluated(tmp_path / name, 0.1, 0.9, trained) for name, trained in (("a", 0.5), ("b", 0.7))]
    runs.append(evaluated(tmp_path / "c", 0.1, 0.8, 0.7))
    with Opened(browser, write_report(runs, tmp_path / "r.html")) as opened:
        bands = opened.page.locator("[data-accuracy] .band")
        assert [bands.nth(i).get_attribute("class") for i in range(bands.count())] == ["band shared", "band r2"]
        assert opened.page.locator("[data-accuracy] .reference").count() == 3


@pytest.mark.parametrize("missing", [(), ("teacher",), ("base", "teacher", "trained", "step 6")])
def test_every_row_of_tiles_is_full(tmp_path, browser, missing):
    run = write_run(tmp_path / "one")
    lines = (run / "evaluations.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["name"] not in missing]
    (run / "evaluations.jsonl").write_text("".join(kept))
    with Opened(browser, write_report([run])) as opened:
        for _ in opened.widths(340, 390, 700, 1000, 1200):
            (within, *_) = boxes(opened.page.locator(".tiles"))
            rows: dict[float, list[list[float]]] = {}
            for box in boxes(opened.page.locator(".tile")):
                rows.setdefault(round(box[1]), []).append(box)
            for row in rows.values():
                assert row[0][0] == pytest.approx(within[0], abs=1)
                assert row[-1][2] == pytest.approx(within[2], abs=1)
            values = opened.page.locator(".tile dd")
            assert values.evaluate_all("all => all.every(e => e.scrollWidth <= e.clientWidth)")


def test_every_section_link_is_in_sight(tmp_path, browser):
    run = write_run(tmp_path / "one")
    append(run / "metrics.jsonl", {"step": 13, "loss": 1.0, "warnings": ["short"]})
    with Opened(browser, write_report([run])) as opened:
        links = opened.page.locator("#links a")
        assert links.count() == 6
        for width in opened.widths(340, 390, 1200):
            ((least, _, most, _),) = boxes(opened.page.locator("#links"))
            assert all(least <= left < right <= most <= width for left, _, right, _ in boxes(links))
            assert opened.page.locator("#links").evaluate("e => e.scrollWidth <= e.clientWidth")


# The brightness of a few pixels at the left and at the right end of a picture's row of pixels.
ENDS = """async picture => {
  const image = new Image();
  image.src = 'data:image/png;base64,' + picture;
  await image.decode();
  const canvas = Object.assign(document.createElement('canvas'), {width: image.width, height: image.height});
  const context = canvas.getContext('2d', {willReadFrequently: true});
  context.drawImage(image, 0, 0);
  return [3, image.width - 4].map(x => [...context.getImageData(x, 2, 1, 1).data].slice(0, 3));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_goes_on_beyond_the_edge_has_a_shadow_there(one_page, browser, scheme):
    with Opened(browser, one_page, scheme, width=390) as opened:
        table = opened.page.locator("[aria-label=Evaluations]")
        assert table.evaluate("e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX === 'auto'")

        def shadows():
            picture = base64.b64encode(table.screenshot()).decode()
            page = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
            plain = [int(part) for part in re.findall(r"\d+", page)][:3]
            return [
                max(abs(a - b) for a, b in zip(end, plain, strict=True)) for end in opened.page.evaluate(ENDS, picture)
            ]

        left, right = shadows()
        assert left <= 2
        assert right >= 25
        table.evaluate("e => { e.scrollLeft = e.scrollWidth; }")
        left, right = shadows()
        assert left >= 25
        assert right <= 2
        opened.requests[:] = [url for url in opened.requests if not url.startswith("data:")]


@pytest.mark.parametrize("words", [4, 150, 1500, None])
def test_no_hole_is_left_under_a_rollout(tmp_path, browser, words):
    view = None if words is None else [token(f" word{n % 7}", 0.9, 0.5, 0.1) for n in range(words)]
    with Opened(browser, write_report([write_run(tmp_path / "one", view=view)])) as opened:
        ((left, _, right, bottom),) = boxes(opened.page.locator(".tokens"))
        ((*_, whole, end),) = boxes(opened.page.locator(".split"))
        if words is None:
            assert whole == right
            return
        ((card_left, card_top, _, card_bottom),) = boxes(opened.page.locator(".card"))
        if words == 4:  # the card below the text
            assert left == card_left
            assert bottom < card_top < bottom + 40
        else:  # the card beside it, and the text as far down as the card
            assert right < card_left
            assert bottom == pytest.approx(end, abs=1)
            written = opened.page.locator(".tokens .tok").last.evaluate(BOX)[3]
            assert bottom - written < 160
            assert card_bottom <= end + 1


def test_several_runs_are_drawn_apart_and_read_together(tmp_path, browser):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=9, objective__beta=1.0)]
    with Opened(browser, write_report(runs, tmp_path / "r.html")) as opened:
        page = opened.page
        lines = page.locator("[data-chart='2'] .plot:visible .line")
        assert lines.count() == 2
        look = "e => [getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray]"
        first, second = (lines.nth(i).evaluate(look) for i in range(2))
        assert first[0] != second[0]
        assert first[1] != second[1]
        chart = page.locator("[data-chart='0'] svg[role=slider]:visible")
        chart.focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert "step 2" in chart.get_attribute("aria-valuetext")
        assert "one loss 0.5" in chart.get_attribute("aria-valuetext")
        other = page.locator("[data-chart='1'] .readout").inner_text()
        assert "step 2" in other  # all charts follow
        page.keyboard.press("End")
        assert page.locator("[data-chart='0'] .readout b").all_inner_texts() == ["0.08333", "–", "0.125", "–"]
        page.keyboard.press("Escape")
        chart.hover(position={"x": 48, "y": 60})
        assert page.locator("[data-chart='2'] .at").inner_text() == "step 1"
        page.locator("#log").check()
        assert page.locator("[data-chart='0'] .plot:visible .line").count() == 4
        options = page.locator("#pick-sample option").all_inner_texts()
        assert [" ".join(text.split()) for text in options][1:4] == [
            "one · step 8 · problem at 8",
            "one · step 12 · problem at 12",
            "two · step 3 · problem at 3",
        ]
        page.locator("#pick-sample").select_option("3")
        assert "two · step 3" in page.locator(".about").inner_text()
        page.get_by_role("button", name="Next rollout").click()
        assert "two · step 6" in page.locator(".about").inner_text()
        assert "problem at 6" in page.locator(".about").inner_text()


def test_curves_are_drawn_without_scripts(one_page, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(one_page.absolute().as_uri())
    assert page.locator("[data-chart] .plot:visible .line").count() >= 5
    assert page.locator("[data-accuracy] .point").count() == 3  # base, step 6, trained
    assert "need JavaScript" in page.inner_text("body")
    assert not page.locator("#token-view").is_visible()
    context.close()


def heights(points):
    """Of the points of a drawn path, in percent of the plot from its top."""
    return [float(pair.split()[1]) for pair in re.findall(r"[\d.e-]+ [\d.e-]+", points)]


def test_a_curve_lies_where_its_values_are_on_both_axes(one_page, browser):
    with Opened(browser, one_page) as opened:
        path = opened.page.locator("[data-chart='0'] .plot:visible .line").first
        linear = heights(path.get_attribute("d"))  # of the losses 1, 1/2, ... 1/12
        for step in range(2, 12):
            share = (1 / step - 1 / 12) / (1 - 1 / 12)
            assert (linear[-1] - linear[step - 1]) / (linear[-1] - linear[0]) == pytest.approx(share, abs=1e-3)
        opened.page.locator("#log").check()
        logarithmic = heights(path.get_attribute("d"))
        for step in range(2, 12):
            share = math.log(12 / step) / math.log(12)
            whole = logarithmic[-1] - logarithmic[0]
            assert (logarithmic[-1] - logarithmic[step - 1]) / whole == pytest.approx(share, abs=1e-3)
        opened.page.locator("[data-chart='0'] svg[role=slider]:visible").focus()
        opened.page.keyboard.press("Home")
        dot = opened.page.locator("[data-chart='0'] .plot:visible .dot").first.get_attribute("cy")
        assert float(dot.rstrip("%")) == pytest.approx(logarithmic[0], abs=0.1)


@pytest.mark.parametrize("content", ["one step", "gap", "no evaluation", "nothing but nulls"])
def test_sparse_runs_draw_without_errors(tmp_path, browser, content):
    run = tmp_path / "one"
    run.mkdir()
    append(run / "metrics.jsonl", {"step": 1, "loss": 0.5, "grad_norm": None})
    if content == "gap":
        append(run / "metrics.jsonl", {"step": 2, "loss": None}, {"step": 3, "loss": 0.25}, {"step": 4, "loss": -0.5})
    if content == "no evaluation":
        append(run / "evaluations.jsonl", {"step": 0, "name": "teacher", "accuracy": 0.5})
    if content == "nothing but nulls":
        nothing = {"text": None, "id": None, "p_student": None, "divergence": None, "alternatives": None}
        append(run / "samples.jsonl", {"step": None, "rollout": "x", "view": [nothing, {}]})
    with Opened(browser, write_report([run])) as opened:
        assert opened.page.locator("[data-chart='0'] .plot:visible .point").count() == 1  # a point that no line reaches
        assert opened.page.locator("[data-chart]").count() == 1


def test_a_real_run_is_reported(tmp_path, browser):
    options = {
        "model.path": write_model(tmp_path / "base"),
        "data.train": write_rows(tmp_path / "train.jsonl"),
        "data.eval": write_rows(tmp_path / "eval.jsonl", 3),
        "optim.steps": 3,
        "optim.batch_size": 3,
        "eval.every": 2,
        "rollout.max_new_tokens": 8,
        "run.device": "cpu",
        "run.sample_every": 2,
        "run.dir": tmp_path / "out",
    }
    assert main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 0
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    view = samples[-1]["view"]
    assert len(view) == samples[-1]["tokens"] > 2
    assert any(entry["divergence"] > 1e-3 for entry in view)
    assert main(["report", str(tmp_path / "out")]) == 0
    with Opened(browser, tmp_path / "out" / "report.html") as opened:
        page = opened.page
        assert page.locator("#pick-sample option").count() == len(samples) == 4  # two of steps 1 and 2
        for i, sample in enumerate(samples):
            page.locator("#pick-sample").select_option(str(i))
            assert page.locator(".tokens").evaluate("e => e.textContent.replaceAll('↵', '')") == sample["rollout"]
        page.locator(".tokens .tok").nth(2).hover()
        assert float(opened.card()["student"]) == pytest.approx(view[2]["p_student"], rel=0.06)
        assert page.locator("[data-accuracy] .point").count() == 3  # base, step 2, trained
        assert "Finished after 3 steps" in page.inner_text("body")


def test_the_templates_styles_and_script_are_part_of_the_package():
    files = resources.files("opsd.report")
    for name in ("page.html.j2", "macros.html.j2", "style.css", "script.js"):
        assert (files / name).is_file()
