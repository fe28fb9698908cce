"""From a configuration to all that a run works with: data, model, teacher, and how they are scored."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch
from torch import nn

from opsd import models
from opsd.checkpoint import fingerprint
from opsd.config import Config, ConfigError
from opsd.data import DataError, name_rows
from opsd.metrics import Display
from opsd.prompts import Example, Prompter, read_examples
from opsd.scorers import Scorer, scorer_of
from opsd.step import Run
from opsd.teachers import Teacher, make_teacher
from opsd_kernels import lm_head_of
from opsd_kernels.packing import plan_passes

MakeTeacher = Callable[[Config, nn.Module, Any], Teacher]
"""make_teacher(config, model, tokenizer) -> Teacher"""


@dataclass(frozen=True)
class Setup:
    """A run that is ready for its first step. `notes` say how it will be done."""

    run: Run
    prompter: Prompter
    scorer: Scorer
    examples: list[Example]
    eval_examples: list[Example]
    counts: dict[str, int]
    notes: list[str]

    def identity(self) -> dict[str, str]:
        """What a checkpoint relies on and does not hold: digests of the initial weights and of the data."""
        data = hashlib.sha256()
        for example in (*self.examples, *self.eval_examples):
            data.update(repr((example.student, example.teacher, example.row.answer)).encode())
        weights = fingerprint(sorted(self.run.model.named_parameters()))
        return {"initial_weights": weights, "data": data.hexdigest()[:16]}


def set_up(config: Config, make: MakeTeacher = make_teacher) -> Setup:
    """Reads the data, loads the model and makes its teacher. Fixes the global random state by `run.seed`.

    Raises:
        ConfigError: something does not fit (`DataError` for a row).
    """
    device = models.pick_device(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    scorer = scorer_of(config)
    torch.manual_seed(config.run.seed)
    tokenizer = models.load_tokenizer(config.model.path)
    prompter = Prompter(tokenizer, config.prompts)
    data = {"train": read_examples(config, prompter, config.data.train or "", required=("problem", "solution"))}
    if config.data.eval:
        required = ("problem", "answer")
        data["eval"] = read_examples(
            config, prompter, config.data.eval, required=required, most=config.eval.max_problems
        )
    counts: dict[str, int] = {}
    notes = []
    for name, part in data.items():
        counts |= {
            f"{name}_rows": len(part.examples),
            f"{name}_rows_skipped": len(part.skipped),
            f"{name}_rows_too_long": len(part.too_long),
        }
        for what, rows in (
            ("cannot be used and are skipped", part.skipped),
            ("are too long and dropped", part.too_long),
        ):
            if rows:
                notes.append(name_rows(f"warning: {len(rows)} rows of data.{name} {what}:", rows))
    examples = data["train"].examples
    eval_examples = data["eval"].examples if "eval" in data else []

    model = models.load_model(config, device)
    _check_context(config, model, [*examples, *eval_examples])
    ends = models.end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    try:
        head = lm_head_of(model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.path {config.model.path!r}: {error}") from error
    teacher = make(config, model, tokenizer)
    packed, how = _packing(config, model, teacher)
    run = Run(config, model, tokenizer, head, teacher, device, ends, pad, packed)
    return Setup(run, prompter, scorer, examples, eval_examples, counts, [*notes, how])


def describe_run(setup: Setup) -> dict[str, Any]:
    """What `run.json` holds: the run's own id, when and with what it was started, and `Setup.identity`."""
    packages = {}
    for name in ("torch", "transformers", "peft", "triton", "opsd"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(setup.run.device) if setup.run.device.type == "cuda" else platform.machine()
    return {
        "id": uuid.uuid4().hex,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "device": device,
        "packages": packages,
        **setup.identity(),
    }


def check_identity(setup: Setup, described: Mapping[str, Any]) -> None:
    """Whether model and data are those that the run of `run.json` began with.

    Raises:
        ConfigError: they have changed, so that a resumed run would be another one.
    """
    sources = {"initial_weights": "model.path", "data": "data.train, data.eval or prompts"}
    for name, value in setup.identity().items():
        if described.get(name) != value:
            raise ConfigError(
                f"the run began with {name.replace('_', ' ')} {described.get(name)!r}, now they are {value!r}: what "
                f"{sources[name]} names has changed since"
            )


def embedded(config: Config, display: Display) -> Config:
    """`config` pointing at the embedded model and its data, made first if need be."""
    from opsd import tiny

    def on_step(step: int, total: int, loss: float) -> None:
        display.advance("preparing the embedded model", step, total, f"loss {loss:.3f}", every=max(1, total // 10))

    directory = tiny.prepare(seed=config.run.seed, on_step=on_step)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(directory / "model")),
        data=dataclasses.replace(config.data, train=str(directory / "train.jsonl"), eval=str(directory / "eval.jsonl")),
    )


def introduce(setup: Setup, run_dir: Any, display: Display) -> None:
    """What is about to happen, with the first prompts as the model reads them."""
    run, example = setup.run, setup.examples[0]
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in run.model.parameters())
    display.note(f"run directory {run_dir}; {run.device.type}; {trained:,} of {total:,} parameters are trained")
    display.note("; ".join(f"{name.replace('_', ' ')} {count}" for name, count in setup.counts.items()))
    if run.config.model.dtype == "bfloat16" and not run.config.lora.enabled:
        display.note("warning: full training of bfloat16 weights loses small updates; model.dtype float32 keeps them")
    for name, ids in (("student", example.student), ("teacher", example.teacher)):
        display.note(f"--- first {name} prompt, {len(ids)} tokens ---\n{run.tokenizer.decode(ids)}")
    display.note("---")
    for note in setup.notes:
        display.note(note)


def _check_context(config: Config, model: nn.Module, examples: Sequence[Example]) -> None:
    """A model run beyond its positions degrades without a word, or fails in the middle of a run."""
    limit = models.decoder_limit(model)
    new = max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    added = f"rollout.max_new_tokens adds {new}"
    if config.teacher.reason_first:
        new += config.teacher.reason_max_new_tokens
        added += f", teacher.reason_max_new_tokens {config.teacher.reason_max_new_tokens}"
    longest = max(max(len(example.student), len(example.teacher)) for example in examples)
    if limit is not None and longest + new > limit:
        raise DataError(
            f"the longest prompt has {longest} tokens and {added}, but the model has {limit} "
            "positions; lower data.max_prompt_tokens (with data.too_long drop) or what is added"
        )


def _packing(config: Config, model: nn.Module, teacher: Teacher) -> tuple[bool, str]:
    """Whether both contexts run as packed rows, and a line that says how.

    Raises ConfigError if they are to and the model does not allow it.
    """
    if config.model.packing == "off":
        return False, "scoring: padded, as asked"
    try:
        model.train()
        plan = plan_passes(model, teacher=teacher.source)
    except (TypeError, ValueError) as error:
        if config.model.packing == "on":
            raise ConfigError(f"model.packing is on, but {error}") from error
        return False, f"scoring: padded, since {error}"
    return True, f"scoring: packed, {plan.passes} ({plan.reason})"
