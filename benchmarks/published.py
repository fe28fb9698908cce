"""A published model, SmolLM2-135M-Instruct, trained by OPSD, its relatives and by supervised fine-tuning.

    python -m benchmarks.published --quick      one task, one seed: base, teacher, and the model after training
    python -m benchmarks.published --measure    all runs that the file of results lacks, most telling first

Every method starts from the same model and sees the same problems in as many steps, with as many rollouts in each. Its
learning rate is chosen for each task from one grid by the problems of dev.jsonl; what is reported is measured on those
of test.jsonl. Besides, of every trained model: its accuracy on the other tasks, and how far it has gone from the base
model on ordinary text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from benchmarks.learning import sft_step
from benchmarks.machine import machine
from benchmarks.published_tasks import PACKAGE, TASKS, convert, final_number, packaged_model, write_data
from opsd.config import load_config
from opsd.data import read_rows
from opsd.files import replace_file
from opsd.models import pick_device, progress_bars
from opsd.prompts import Prompter, encode_rows
from opsd.rollouts import Sampling
from opsd.run import Run, StepResult
from opsd.scoring import rollout_hidden
from opsd.step import opsd_step
from opsd.trainer import resume, train

RESULTS = Path(__file__).parent / "results"
WORK = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opsd" / "published"
SEEDS = (0, 1, 2)
LEARNING_RATES = (4e-5, 8e-5, 2e-5, 1e-5)  # in the order in which they are tried
STEPS, EVERY = 30, 10
QUICK_STEPS, QUICK_RATE = 24, 4e-5
OTHERS = 50  # problems of each other task, and of dev on the way


@dataclass(frozen=True)
class Method:
    name: str  # in the table and the plot
    color: str
    options: dict[str, Any] = field(default_factory=dict)
    supervised: bool = False


METHODS = {
    "opsd": Method("OPSD, JSD (β = 0.5)", "#0b6bcb"),
    "sft": Method("SFT on the worked solutions", "#b3261e", supervised=True),
    "sampled": Method("OPSD, sampled-token form", "#e07b00", {"objective.form": "sampled_token"}),
    "forward": Method("OPSD, forward KL (β = 0)", "#6aa9e0", {"objective.beta": 0.0}),
    "reverse": Method("OPSD, reverse KL (β = 1)", "#5b3fa8", {"objective.beta": 1.0}),
    "purified": Method("Purified", "#3c8c40", {"objective.recipe": "purified"}),
    "opd_plus": Method("OPD+", "#8c6d3c", {"objective.recipe": "opd_plus"}),
    "rlsd": Method(
        "RLSD, 4 rollouts of each of 4 problems",
        "#c2478f",
        {"objective.recipe": "rlsd", "rollout.per_prompt": 4, "optim.batch_size": 4},
    ),
}
CORE = tuple(METHODS)[:6]


@dataclass(frozen=True)
class Job:
    """A run; without a method, what is known of the base model on the task."""

    task: str
    method: str = ""
    lr: float = 0.0
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.task} {self.method} lr {self.lr:g} seed {self.seed}" if self.method else f"{self.task} untrained"


@dataclass(frozen=True)
class Place:
    """Where a run is made, and what it has other than by its method."""

    model: str
    data: str
    device: str
    options: dict[str, Any]
    steps: int
    every: int
    problems: int  # of dev and of test, at most
    passages: int
    deadline: float  # on time.time's clock; inf: none


class OutOfTime(Exception):
    pass


def options_of(job: Job, place: Place) -> dict[str, Any]:
    """The options of `opsd train` that differ from its defaults."""
    task = TASKS[job.task]
    return {
        "model.path": place.model,
        "data.train": f"{place.data}/{job.task}/train.jsonl",
        "rollout.max_new_tokens": task.tokens,
        "rollout.batch_size": 64,
        "optim.lr": job.lr or None,
        "optim.steps": place.steps,
        "optim.batch_size": 16,
        "optim.micro_batch_size": 8,
        "optim.warmup_steps": 3,
        "eval.scorer": "benchmarks.published_tasks:final_number",
        "run.device": place.device,
        "run.seed": job.seed,
        "run.threads": 1,
        "run.save": False,
        "run.checkpoint_every": 0,
        "run.sample_every": 0,
        **({"prompts.teacher": task.teacher} if task.teacher else {}),
        **(METHODS[job.method].options if job.method else {}),
        **place.options,
    }


def answers(run: Run, place: Place, names: Sequence[str], part: str, most: int, who: str = "student") -> dict[str, Any]:
    """For each task named, the answers to its problems: a string of 1 (right) and 0, and the first three texts."""
    found = {}
    for name in names:
        rows = read_rows(f"{place.data}/{name}/{part}.jsonl", required=("problem", "answer")).rows[:most]
        teacher = TASKS[name].teacher
        prompts = run.config.prompts.model_copy(update={"teacher": teacher} if teacher else {})
        known = encode_rows(Prompter(run.tokenizer, prompts), rows, run.config.data)[0]
        sampling = Sampling(TASKS[name].tokens, temperature=0.0)
        with run.teacher.active() if who == "teacher" else progress_bars(False) as taught:
            model = taught if who == "teacher" else run.model
            written = run.engine.write(model, [getattr(e, who) for e in known], sampling, [0] * len(known), 200)
        texts = [run.tokenizer.decode(rollout.ids, skip_special_tokens=True) for rollout in written]
        right = [str(int(final_number(text, e.row))) for text, e in zip(texts, known, strict=True)]
        found[name] = {"right": "".join(right), "first": texts[:3]}
    return found


@torch.no_grad()
def on_text(run: Run, place: Place) -> dict[str, float]:
    """Over the tokens of ordinary text: the forward KL from the base model to the trained one, and both entropies'
    cross terms, the mean negative log-probabilities, all in nats."""
    lines = Path(place.data, "text.jsonl").read_text(encoding="utf-8").splitlines()[: place.passages]
    ids = [run.tokenizer.encode(json.loads(line)["text"]) for line in lines]
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, len(ids), 4):
        texts = ids[start : start + 4]
        first, rest = [t[:1] for t in texts], [t[1:] for t in texts]
        hidden = {"trained": rollout_hidden(run.model.eval(), first, rest), "base": run.teacher.hidden(first, rest)}
        heads = {"trained": run.head, "base": run.teacher.head}
        logprobs = {k: torch.log_softmax((h @ heads[k].weight.T).float(), -1) for k, h in hidden.items()}
        targets = torch.tensor([token for t in rest for token in t], device=run.device)[:, None]
        kl = (logprobs["base"].exp() * (logprobs["base"] - logprobs["trained"])).sum()
        sums += torch.stack([kl, *(-logprobs[k].gather(1, targets).sum() for k in ("base", "trained"))]).double().cpu()
    tokens = sum(len(t) - 1 for t in ids)
    return dict(zip(("kl", "base", "trained"), (sums / tokens).tolist(), strict=True)) | {"tokens": tokens}


def run_job(job: Job, place: Place) -> dict[str, Any]:
    """Trains once; the curve is measured on dev, and on test, the other tasks and ordinary text at the end."""
    began, held, curve, losses = time.perf_counter(), {}, [], []

    def measure(run: Run, step: int) -> None:
        most = place.problems if step == place.steps else min(OTHERS, place.problems)
        curve.append([step, answers(run, place, [job.task], "dev", most)[job.task]["right"]])

    def step(run: Run, examples: Sequence[Any], number: int) -> StepResult:
        if time.time() > place.deadline:
            raise OutOfTime
        held["run"] = run
        if number > 1 and (number - 1) % place.every == 0:
            measure(run, number - 1)
        began_step = time.perf_counter()
        run.model.train()
        of = sft_step if METHODS[job.method].supervised else opsd_step
        result = of(run, examples, number)
        losses.append([float(result.loss), result.tokens, round(time.perf_counter() - began_step, 3)])
        return result

    record: dict[str, Any] = asdict(job) | {"steps": place.steps, "curve": curve, "train": losses}
    with tempfile.TemporaryDirectory() as scratch:
        options = options_of(job, place) | {"run.dir": f"{scratch}/run"}
        try:
            train(load_config(None, options.items()), quiet=True, step=step)
            run = held["run"]
            measure(run, place.steps)
            record["test"] = answers(run, place, [job.task], "test", place.problems)[job.task]
            others = [name for name in TASKS if name != job.task and Path(place.data, name).is_dir()]
            rest = answers(run, place, others, "test", min(OTHERS, place.problems)) if others else {}
            record["others"] = {name: found["right"] for name, found in rest.items()}
            record["text"] = on_text(run, place)
        except OutOfTime:
            record["unfinished"] = True
    record["seconds"] = round(time.perf_counter() - began, 1)
    return record


def run_untrained(job: Job, place: Place) -> dict[str, Any]:
    """What the base model gets right, without and with the worked solution to read."""
    began, held = time.perf_counter(), {}

    def step(run: Run, examples: Sequence[Any], number: int) -> StepResult:
        held["run"] = run
        raise OutOfTime

    with tempfile.TemporaryDirectory() as scratch, suppress(OutOfTime):
        options = options_of(job, place) | {"run.dir": f"{scratch}/run"}
        train(load_config(None, options.items()), quiet=True, step=step)
    record: dict[str, Any] = asdict(job)
    for part in ("dev", "test"):
        for name, who in (("base", "student"), ("teacher", "teacher")):
            found = answers(held["run"], place, [job.task], part, place.problems, who)
            record[f"{name}_{part}"] = found[job.task] if part == "test" else found[job.task]["right"]
    return record | {"seconds": round(time.perf_counter() - began, 1)}


def _end_with(parent: Any) -> None:
    """A run takes long, and nobody reads what it found."""
    parent.join()
    os._exit(1)


def work(number: int, pipe: Connection, place: Place, log: Path) -> None:
    """A worker process: makes the runs that it is sent, until it is sent None. What it prints goes to `log`."""
    Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    with log.open("a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        torch.set_num_threads(1)
        if place.device != "cpu":
            torch.set_float32_matmul_precision("high")
        while (job := pipe.recv()) is not None:
            print(f"{time.strftime('%H:%M:%S')} worker {number}: {job}", flush=True)
            try:
                made = (run_job if job.method else run_untrained)(job, place)
            except Exception as error:
                traceback.print_exc()
                made = asdict(job) | {"error": f"{type(error).__name__}: {error}"}
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            pipe.send(made)


def key(of: Mapping[str, Any] | Job) -> tuple[str, str, float, int]:
    values = asdict(of) if isinstance(of, Job) else of
    return values["task"], values["method"], values["lr"], values["seed"]


def share(marks: str) -> float:
    """Of answers, a string of 1 (right) and 0."""
    return marks.count("1") / len(marks)


def right(record: Mapping[str, Any]) -> float:
    """The share of dev that a finished run got right at its end."""
    return share(record["curve"][-1][1])


def best_rates(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """For each task and method the learning rate with the best end on dev with the first seed; the lower of equals."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in records:
        if record["method"] and record["seed"] == SEEDS[0]:
            found.setdefault((record["task"], record["method"]), []).append((-right(record), record["lr"]))
    return {pair: min(tried)[1] for pair, tried in found.items()}


def plan(tasks: Sequence[str], methods: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Iterator[Job]:
    """All runs, most telling first: each method on the first task, then on the others, then the other learning rates
    and, for what is known to be the best of these, the other seeds, task by task."""
    first, *more = LEARNING_RATES
    core = [m for m in methods if m in CORE]
    for task in tasks:
        yield Job(task)
        yield from (Job(task, method, first, SEEDS[0]) for method in core)
    done = {key(record) for record in records}
    for task in tasks:
        for method in methods:
            yield from (Job(task, method, lr, SEEDS[0]) for lr in (first, *more))
            if all((task, method, lr, SEEDS[0]) in done for lr in LEARNING_RATES):
                rate = best_rates(records)[task, method]
                yield from (Job(task, method, rate, seed) for seed in SEEDS[1:])


class Workers:
    """Processes that make runs side by side."""

    def __init__(self, count: int, place: Place, out: Path):
        context, self.jobs = get_context("spawn"), dict[Connection, Job | None]()
        self.processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(number, theirs, place, out / f"worker-{number}.log"))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.jobs[ours] = None

    def idle(self) -> list[Connection]:
        return [pipe for pipe, job in self.jobs.items() if job is None]

    def give(self, pipe: Connection, job: Job) -> None:
        self.jobs[pipe] = job
        pipe.send(job)

    def finished(self, timeout: float) -> list[tuple[Job, dict[str, Any]]]:
        """The runs that ended within `timeout` seconds; of a worker that died, what it was at."""
        ended = []
        for pipe in wait([pipe for pipe, job in self.jobs.items() if job is not None], timeout):
            assert isinstance(pipe, Connection)
            job = self.jobs[pipe]
            assert job is not None
            try:
                ended.append((job, pipe.recv()))
                self.jobs[pipe] = None
            except (EOFError, ConnectionError):
                ended.append((job, asdict(job) | {"error": "the worker died; its log may say why"}))
                del self.jobs[pipe]
        return ended

    def end(self) -> None:
        for pipe in self.idle():
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()


def measure(place: Place, out: Path, workers: int, tasks: Sequence[str], methods: Sequence[str]) -> Path:
    """Makes the runs that OUT/published.json lacks, as far as the deadline lets it, and writes that file after each."""
    path = out / "published.json"
    out.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": [], "left_out": []}
    records: list[dict[str, Any]] = stored["runs"]
    began, lasted, failed = time.time(), dict[tuple[str, str], float](), set[tuple]()
    for record in records:
        lasted[record["task"], record["method"]] = record["seconds"]
    described = about(place, workers)
    if stored.get("options", described["options"]) != described["options"]:
        raise SystemExit(f"{path} holds runs with other options; name another --out")

    def expected(job: Job) -> float:
        """Seconds, by the runs there were: of this kind, else of the same method at the same length, else the most."""
        known = lasted.get((job.task, job.method))
        same = [s * TASKS[job.task].tokens / TASKS[t].tokens for (t, m), s in lasted.items() if m == job.method]
        return known if known is not None else max(same, default=0.0)

    pool = Workers(workers, place, out)
    try:
        while True:
            done, given = {key(r) for r in records} | failed, {key(j) for j in pool.jobs.values() if j is not None}
            wanted = [job for job in dict.fromkeys(plan(tasks, methods, records)) if key(job) not in done | given]
            left = place.deadline - time.time()
            fits = iter([job for job in wanted if expected(job) < left])
            for pipe, job in zip(pool.idle(), fits, strict=False):
                pool.give(pipe, job)
            if not any(pool.jobs.values()):
                break
            for job, made in pool.finished(timeout=5.0):
                if "error" in made or made.get("unfinished"):
                    failed.add(key(job))
                    stored["left_out"] = [*stored["left_out"], made]
                else:
                    records.append(made)
                    lasted[job.task, job.method] = made["seconds"]
                replace_file(path, json.dumps({**described, **stored, "seconds": time.time() - began}, indent=1) + "\n")
                rest = sum(expected(job) for job in wanted) / max(1, workers)
                print(f"[{len(records)}] {told(made)}; about {rest / 60:.0f} min to go", flush=True)
    finally:
        pool.end()
    return path


def told(record: Mapping[str, Any]) -> str:
    job = str(Job(record["task"], record["method"], record["lr"], record["seed"]))
    if "error" in record or record.get("unfinished"):
        return f"{job}: {record.get('error', 'out of time')}"
    shares = {name: share(marks) for name, marks in (
        [("base", record["base_test"]["right"]), ("teacher", record["teacher_test"]["right"])]
        if not record["method"]
        else [*((f"step {s}", m) for s, m in record["curve"]), ("test", record["test"]["right"])]
    )}  # fmt: skip
    return f"{job}: {', '.join(f'{n} {v:.0%}' for n, v in shares.items())}; {record['seconds']:.0f} s"


def about(place: Place, workers: int) -> dict[str, Any]:
    """What a reader of the results must know of how they were made."""
    device = pick_device(place.device)
    source = json.loads(Path(place.model, "source.json").read_text(encoding="utf-8"))
    common = {k: v for k, v in options_of(Job("sums"), place).items() if k not in ("model.path", "data.train")}
    options = {"steps": place.steps, "every": place.every, "learning_rates": LEARNING_RATES, **common}
    of_tasks = {name: {"title": t.title, "tokens": t.tokens, "teacher": t.teacher} for name, t in TASKS.items()}
    return json.loads(json.dumps({
        **machine(device), "workers": workers, "package": PACKAGE, "model": source, "options": options,
        "methods": {name: method.options for name, method in METHODS.items()}, "tasks": of_tasks,
    }))  # fmt: skip


def quick(place: Place, directory: Path) -> None:
    """One run of `opsd train` as a user sees it, in `directory`, where a run that was cut off goes on."""
    if (directory / "run.json").is_file():
        result = resume(directory)
    else:
        options = options_of(Job("sums", "opsd", QUICK_RATE, SEEDS[0]), place) | {
            "data.eval": f"{place.data}/sums/test.jsonl",
            "eval.max_problems": min(50, place.problems),
            "eval.batch_size": 50,
            "optim.batch_size": 8,
            "run.checkpoint_every": 6,
            "run.dir": str(directory),
            "run.sample_every": 6,
            "run.save": True,
            "run.threads": None,
            **place.options,
        }
        print(
            f"{place.steps} steps of {options['optim.batch_size']} rollouts, ten minutes or more; a run that was"
            " stopped goes on with the same command",
            flush=True,
        )
        result = train(load_config(None, options.items()))
    base, teacher, trained = (result.evaluations[name] for name in ("base", "teacher", "trained"))
    print(
        f"three-number sums, greedy, {base.problems} held-out problems: {base.accuracy:.0%} before"
        f" ({base.low:.0%} to {base.high:.0%}), {trained.accuracy:.0%} after ({trained.low:.0%} to {trained.high:.0%});"
        f" shown the solution, the model it began as has {teacher.accuracy:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--quick", action="store_true")
    what.add_argument("--measure", action="store_true")
    what.add_argument("--prepare", action="store_true", help="only make the model and the data")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where published.json is and the workers' logs go")
    parser.add_argument("--work", type=Path, default=WORK, help="where the model and the data are made")
    parser.add_argument("--data", type=Path, help="data that are made already")
    parser.add_argument("--model", type=Path, help="GGUF file or directory; default: that of the package")
    parser.add_argument("--gsm8k", type=Path, help="directory of GSM8K's train.jsonl and test.jsonl; default: the hub")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run that would end later")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}, with --quick {QUICK_STEPS}")
    parser.add_argument("--problems", type=int, default=200, help="of dev and of test, at most")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of opsd train")
    given = parser.parse_args()
    began = time.time()
    steps = given.steps or (QUICK_STEPS if given.quick else STEPS)
    tasks = ("sums",) if given.quick else tuple(given.tasks.split(","))
    data = given.data or given.work / "data"
    if given.data is None:
        write_data(data, given.gsm8k, names=tasks)
    convert(given.model or packaged_model(), given.work / "model")
    if given.prepare:
        return print(f"model and data are in {given.work}")
    options = dict(option.split("=", 1) for option in given.option)
    place = Place(
        str(given.work / "model"), str(data), pick_device(given.device).type, options, steps,
        min(EVERY, steps), given.problems, 48, began + given.seconds,
    )  # fmt: skip
    if given.quick:
        return quick(place, given.work / "quick")
    print(measure(place, given.out, given.workers, tasks, tuple(given.methods.split(","))))


if __name__ == "__main__":
    sys.exit(main())
