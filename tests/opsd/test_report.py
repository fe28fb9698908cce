"""The report of a run: its HTML by reading it, the page itself in a headless browser where there is one."""

import json
import re
import shutil
from html import unescape
from importlib import resources
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from _models import write_model, write_rows

import opsd.report.page
from opsd.cli import main
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


def evaluated(path, base, teacher, trained, wide=0.05):
    """A run with these accuracies, each in the middle of an interval of twice `wide`, as far as there is room."""
    run = write_run(path)
    (run / "evaluations.jsonl").unlink()
    for step, name, accuracy in ((0, "base", base), (0, "teacher", teacher), (12, "trained", trained)):
        interval = {"low": max(0.0, accuracy - wide), "high": min(1.0, accuracy + wide)}
        append(run / "evaluations.jsonl", {"step": step, "name": name, "accuracy": accuracy, **interval})
    return run


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
    assert "/somewhere/far/away/train.jsonl" in text
    assert "1,200 (50 per second)" in text  # rollout tokens
    assert "04 March 2026, 05:06 UTC" in text
    assert "torch 2.13.0, opsd 0.1.0" in text
    assert "0.08333" in text  # the last loss
    assert "rollout 50.0% 12 s, 1 s a step" in text
    assert "other 12.5% 3 s, 0.25 s a step" in text
    assert "24 s, and 16 s for loading" in text
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
        "short &lt;b&gt; (step 13)",
        "No evaluation was recorded",
        "Not finished: 13 steps",
    ):
        assert note in text
    points = payload(html)["charts"][0][0]
    assert points[-2:] == [[12, 7.0], [13, None]]  # the later record of a step that was run again


def test_a_single_step_without_anything_else(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    append(run / "metrics.jsonl", {"step": 1, "loss": 0.5})
    html = write_report([run]).read_text()
    assert payload(html)["charts"] == [[[[1, 0.5]]]]
    assert re.findall(r"<h3>(.*?) <span class=\"unit\">(.*?)</span></h3>", html) == [("Loss", "nats per token")]
    assert "No rollout is shown" in text_of(html)


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
    assert "one: 10 of 103 rollouts are here; the others are in samples.jsonl." in text_of(html)
    shown = payload(html)["samples"]
    assert len(shown) == 10
    assert (shown[0]["name"], shown[-1]["name"]) == ("step 400 · problem at 400", "step 1299")


def test_long_rollouts_are_cut_and_fewer(tmp_path, monkeypatch):
    run = write_run(tmp_path / "one", steps=30)
    monkeypatch.setattr(opsd.report.page, "MAX_TOKENS", 4)
    monkeypatch.setattr(opsd.report.page, "MAX_PAGE_TOKENS", 8)
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
    assert f"<h1>{tmp_path.name}/a, x/a</h1>" in html
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
    figures = re.findall(r'<figure class="chart">.*?</figure>', html, re.S)
    assert len(figures) == len(CHARTS)
    for chart, figure in zip(CHARTS, figures, strict=True):
        assert chart.note.endswith(".")
        assert chart.title in unescape(text_of(figure))
        assert chart.note in unescape(text_of(figure))
        assert f'role="img" aria-label="{chart.title} by step"' in unescape(figure)


def drawn(html, chart=0):
    """Of each line of a chart, (x, y) of its points in percent of the plot from the top left corner."""
    figure = re.findall(r'<figure class="chart">.*?</figure>', html, re.S)[chart]
    paths = re.findall(r'preserveAspectRatio="none"><path class="line" d="(.*?)"', figure)
    return [[tuple(map(float, pair.split())) for pair in re.split("[ML]", path)[1:]] for path in paths]


def test_a_curve_lies_where_its_values_are(tmp_path):
    points = drawn(write_report([evaluated(tmp_path / "one", 0.1, 0.9, 0.5)]).read_text())[0]
    x, y = zip(*points, strict=True)  # of the losses 1, 1/2, ... 1/12
    assert x == pytest.approx([100 * step / 11 for step in range(12)], abs=0.01)
    for step in range(1, 13):
        assert (y[-1] - y[step - 1]) / (y[-1] - y[0]) == pytest.approx((1 / step - 1 / 12) / (1 - 1 / 12), abs=1e-3)


def test_a_chart_of_many_magnitudes_is_logarithmic_and_says_so(tmp_path):
    run = tmp_path / "one"
    run.mkdir()
    for step in range(1, 12):
        spread = {"loss": 10.0**-step, "grad_norm": 10.0**-step - 1e-9, "truncated": 10.0**-step}
        append(run / "metrics.jsonl", {"step": step, **spread})
    html = write_report([run]).read_text()
    loss, truncated, norm = (text_of(f) for f in re.findall(r'<figure class="chart">.*?</figure>', html, re.S))
    assert "nats per token (logarithmic)" in loss
    assert "logarithmic" not in truncated  # shares never are
    assert "logarithmic" not in norm  # the last is negative
    assert " 1e-10 1e-05 2 4 " in loss
    heights = [y for _, y in drawn(html)[0]]
    assert [b - a for a, b in pairwise(heights)] == pytest.approx(10 * [heights[1] - heights[0]], abs=0.03)


def test_the_accuracies_have_their_intervals_and_references(tmp_path):
    runs = [evaluated(tmp_path / name, 0.1, 0.8, trained) for name, trained in (("a", 0.5), ("b", 0.7))]
    runs.append(evaluated(tmp_path / "c", 0.1, 0.7, 0.7))
    html = write_report(runs, tmp_path / "r.html").read_text()
    figure = re.search(r'<figure class="wide">.*?</figure>', html, re.S)[0]
    # A teacher and a base model that runs share are drawn once, in no run's colour.
    assert re.findall(r'class="band (.*?)"', figure) == ["teacher shared", "base shared", "teacher r2"]
    assert re.findall(r'class="reference (.*?)"', figure) == ["teacher shared", "base shared", "teacher r2"]
    bars = re.findall(r'class="error" x1="(.*?)%" x2=".*?" y1="(.*?)%" y2="(.*?)%"', figure)
    assert len(bars) == 6  # base and trained of each
    assert [float(x) for x, *_ in bars[:2]] == [0, 100]
    # The axis begins at 0 and ends 6 % above what is drawn, which is from 5 to 85 %; the first bar is from 5 to 15 %.
    high = 85 + 0.06 * 80
    assert [float(y) for y in bars[0][1:]] == pytest.approx([100 * (1 - v / high) for v in (5, 15)], abs=0.01)


def test_curves_and_last_values_need_no_script(one_page):
    html = one_page.read_text()
    assert all(len(line) == 12 for chart in range(5) for line in drawn(html, chart))
    assert "loss 0.08333" in text_of(html)
    assert "need JavaScript" in re.search("<noscript>(.*?)</noscript>", html)[1]


# In a browser


@pytest.fixture(scope="module")
def browser():
    """A page of a browser."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(names)}")
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield launched.new_page()
        launched.close()


@pytest.fixture(scope="module")
def one_page(tmp_path_factory):
    return write_report([write_run(tmp_path_factory.mktemp("report") / "one")])


@pytest.fixture(scope="module")
def two_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [write_run(folder / "a-run-with-quite-a-long-name"), write_run(folder / "two", objective__beta=1.0)]
    return write_report(runs, folder / "r.html")


def boxes(locator):
    box = "e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }"
    return locator.evaluate_all(f"all => all.map({box})")


class Opened:
    """A file in the browser's page, with what it complained about and what it asked the network for."""

    def __init__(self, page, file, scheme="light", width=1200):
        self.page, self.url, self.errors, self.requests = page, file.absolute().as_uri(), [], []
        self.listeners = {
            "console": lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None,
            "pageerror": lambda error: self.errors.append(str(error)),
            "request": lambda request: self.requests.append(request.url),
        }
        for event, listener in self.listeners.items():
            page.on(event, listener)
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.goto(self.url)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        hacked = self.page.evaluate("window.hacked")
        for event, listener in self.listeners.items():
            self.page.remove_listener(event, listener)
        self.page.goto("about:blank")
        if kind is None:
            assert self.errors == []
            assert self.requests == [self.url]
            assert hacked is None

    def card(self):
        read = self.page.locator("#token-view aside").locator
        rows = [row.inner_text().split() for row in read("tbody tr").all()]
        return read(".word").inner_text(), read(".place").inner_text(), read(".divergence").inner_text(), rows


IS = (
    "␣is",
    "token 2 of 6, id 5",
    "0.31",
    [["␣is", "sampled", "0.62", "0.031"], ["␣makes", "0.1", "0.7"]],
)


def test_hovering_a_token_shows_its_numbers(one_page, browser):
    with Opened(browser, one_page) as opened:
        card = opened.page.locator("#token-view aside")
        opened.page.locator(".tokens .tok").nth(4).click()
        opened.page.locator(".tokens .tok").nth(1).hover()
        assert opened.card() == IS
        assert card.locator(".verdict").inner_text() == "The teacher likes it less"
        dominant = "in all; the largest term, 0.2, is that of ␣makes (student 0.1, teacher 0.7)"
        assert card.locator(".dominant").inner_text() == dominant
        filled = (
            card.locator("tbody tr")
            .nth(1)
            .locator(".meter.teacher")
            .evaluate("e => getComputedStyle(e).backgroundImage")
        )
        assert "70%" in filled
        opened.page.locator("h1").hover()
        assert opened.card()[0] == "é"  # the chosen one


def test_the_page_stays_in_place_under_a_pointer(tmp_path, browser):
    view = [{**VIEW[0], "alternatives": [[f"w{k}", 0.1, 0.1] for k in range(count)]} for count in (10, 1, 10, 1)]
    with Opened(browser, write_report([write_run(tmp_path / "one", view=view)])) as opened:
        opened.page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
        tokens = opened.page.locator(".tokens .tok")
        opened.page.locator("#token-view").scroll_into_view_if_needed()
        before = boxes(tokens)
        for i in range(4):
            tokens.nth(i).hover()
            assert boxes(tokens) == before


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

        def after(*keys):
            for key in keys:
                page.keyboard.press(key)
            return opened.card()[1].split()[1]

        assert page.locator(".tokens [tabindex='0']").count() == 1  # one stop, arrow keys within
        page.locator(".problem").focus()
        page.keyboard.press("Tab")
        assert opened.card() == IS  # the first disagreement
        label = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert label == "␣is: student 0.62, teacher 0.031, divergence 0.31 nats. The teacher likes it less."
        assert [after("ArrowRight"), after("ArrowLeft"), after("ArrowLeft", "ArrowLeft")] == ["3", "2", "1"]
        assert [after("End"), after("ArrowRight"), after("Home")] == ["6", "6", "1"]
        # Down and up to the disagreements, from the last to the first and back.
        assert [after("ArrowDown") for _ in range(5)] == ["2", "3", "5", "6", "2"]
        assert [after("ArrowUp") for _ in range(3)] == ["6", "5", "3"]
        assert page.locator(".tokens [aria-selected='true']").count() == 1
        page.get_by_role("button", name="Next disagreement").click()
        assert opened.card()[0] == "é"


def test_hostile_text_is_only_text(tmp_path, browser):
    run = write_run(tmp_path / "one", model__path=HOSTILE)
    append(
        run / "metrics.jsonl", {"step": 13, "loss": 1.0, HOSTILE: 3.0, "seconds_" + HOSTILE: 1.0, "warnings": [HOSTILE]}
    )
    append(run / "samples.jsonl", {"step": 13, "source": HOSTILE, "problem": HOSTILE, "rollout": HOSTILE})
    with Opened(browser, write_report([run])) as opened:
        page = opened.page
        page.locator(".tokens .tok").nth(5).hover()
        assert opened.card()[0] == HOSTILE.replace(" ", "␣")
        page.locator("#token-view select").select_option("3")
        assert page.locator(".tokens").inner_text().replace("\u2028", "") == HOSTILE.replace("\u2028", "")
        assert page.locator(".problem").text_content() == HOSTILE
        assert not page.locator("#token-view aside").is_visible()
        assert page.locator("img").count() == 0


def test_light_and_dark_differ_and_the_button_changes_them(one_page, browser):
    look = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    seen = {}
    for scheme in ("light", "dark"):
        with Opened(browser, one_page, scheme) as opened:
            seen[scheme] = opened.page.evaluate(look)
            opened.page.locator("#theme").click()
            seen[f"not {scheme}"] = opened.page.evaluate(look)
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
  for (const e of document.querySelectorAll('body *')) {
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


def test_all_text_has_contrast(two_page, browser):
    for scheme in ("light", "dark"):
        with Opened(browser, two_page, scheme) as opened:
            assert opened.page.evaluate(CONTRAST) == []


def test_nothing_is_wider_than_the_screen(two_page, browser):
    for width in (340, 390, 1200):
        with Opened(browser, two_page, width=width) as opened:
            assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_several_runs_are_drawn_apart_and_read_together(tmp_path, browser):
    runs = [write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=9, objective__beta=1.0)]
    with Opened(browser, write_report(runs, tmp_path / "r.html")) as opened:
        page = opened.page
        charts = page.locator(".chart")
        lines = charts.nth(2).locator(".plot .line")
        assert lines.count() == 2
        look = "e => [getComputedStyle(e).stroke, getComputedStyle(e).strokeDasharray]"
        first, second = (lines.nth(i).evaluate(look) for i in range(2))
        assert first[0] != second[0]
        assert first[1] != second[1]
        read = charts.nth(0).locator(".values b").all_inner_texts
        assert read() == ["0.08333", "0.1111", "0.125", "0.1667"]  # the last of each
        page.get_by_label("Values at").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert page.locator("output").inner_text() == "step 2"
        assert read() == ["0.5", "0.5", "0.75", "0.75"]
        page.keyboard.press("End")
        assert read() == ["0.08333", "–", "0.125", "–"]  # the second run ended before
        ((left, _, right, _),) = boxes(charts.nth(1).locator(".axis"))
        charts.nth(1).locator(".plot").scroll_into_view_if_needed()
        charts.nth(1).locator(".plot").hover(position={"x": 50 + 4.2 / 11 * (right - left), "y": 60})
        assert page.locator("output").inner_text() == "step 5"
        assert read()[:2] == ["0.2", "0.2"]  # all charts follow
        ((cursor, *_),) = boxes(charts.nth(0).locator(".cursor"))
        ((left, _, right, _),) = boxes(charts.nth(0).locator(".axis"))
        assert (cursor - left) / (right - left) == pytest.approx(4 / 11, abs=0.01)
        pick = page.locator("#token-view select")
        assert pick.locator("option").all_inner_texts()[1:4] == [
            "one · step 8 · problem at 8",
            "one · step 12 · problem at 12",
            "two · step 3 · problem at 3",
        ]
        pick.select_option("3")
        assert page.locator(".about").inner_text() == "two · step 3 · 6 tokens · ended by itself · train.jsonl:4"
        assert page.locator(".problem").inner_text() == "problem at 3"


def test_sparse_runs_draw_without_errors(tmp_path, browser):
    for content in ("one step", "gap", "no evaluation", "nothing but nulls"):
        run = tmp_path / content
        run.mkdir()
        append(run / "metrics.jsonl", {"step": 1, "loss": 0.5, "grad_norm": None})
        if content == "gap":
            later = [{"step": 2, "loss": None}, {"step": 3, "loss": 0.25}, {"step": 4, "loss": -0.5}]
            append(run / "metrics.jsonl", *later)
        if content == "no evaluation":
            append(run / "evaluations.jsonl", {"step": 0, "name": "teacher", "accuracy": 0.5})
        if content == "nothing but nulls":
            nothing = {"text": None, "id": None, "p_student": None, "divergence": None, "alternatives": None}
            append(run / "samples.jsonl", {"step": None, "rollout": "x", "view": [nothing, {}]})
        with Opened(browser, write_report([run])) as opened:
            assert opened.page.locator(".chart .point").count() == 1  # a point that no line reaches
            assert opened.page.locator(".chart").count() == 1
            assert opened.page.locator(".tokens .tok").count() == (2 if content == "nothing but nulls" else 0)


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
        assert page.locator("#token-view option").count() == len(samples) == 4  # two of steps 1 and 2
        for i, sample in enumerate(samples):
            page.locator("#token-view select").select_option(str(i))
            assert page.locator(".tokens").evaluate("e => e.textContent.replaceAll('↵', '')") == sample["rollout"]
        page.locator(".tokens .tok").nth(2).hover()
        assert float(opened.card()[3][0][-2]) == pytest.approx(view[2]["p_student"], rel=0.06)
        assert page.locator(".wide .point").count() == 3  # base, step 2, trained
        assert "Finished after 3 steps" in page.inner_text("body")


def test_the_templates_styles_and_script_are_part_of_the_package():
    files = resources.files("opsd.report")
    for name in ("page.html.j2", "style.css", "script.js"):
        assert (files / name).is_file()
