"""From a configuration to all that a run works with: data, model, teacher, and how they are scored."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import platform
import random
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from opsd import models
from opsd.checkpoint import fingerprint
from opsd.config import Config, ConfigError, unused_options
from opsd.data import DataError, name_rows
from opsd.metrics import Display
from opsd.optim import learning_rate
from opsd.prompts import Example, Prompter, read_examples
from opsd.rollouts import Rollout
from opsd.scorers import Scorer, scorer_of
from opsd.step import Run, token_divergence
from opsd.teachers import Teacher, check_teacher, make_teacher
from opsd_kernels import lm_head_of
from opsd_kernels.packing import dual_hidden_states, pack_dual_context, plan_passes


class MakeTeacher(Protocol):
    """What makes the teacher, in place of `opsd.teachers.make_teacher`: a function of (config, model, tokenizer)."""

    def __call__(self, config: Config, model: nn.Module, tokenizer: Any, /) -> Teacher:
        """The teacher of `model`, the student, as it is before the first step."""


@dataclass(frozen=True)
class Setup:
    """A run that is ready for its first step. `notes` say how it will be done, `warnings` what may be a mistake."""

    run: Run
    prompter: Prompter
    scorer: Scorer
    examples: list[Example]
    eval_examples: list[Example]
    counts: dict[str, int]
    notes: list[str]
    warnings: list[str]

    def identity(self) -> dict[str, str]:
        """What a checkpoint relies on and does not hold: digests of initial weights, the teacher's, and the data."""
        found = {
            "model.path": fingerprint(sorted(self.run.model.named_parameters())),
            "data.train": _digest(self.examples),
            "data.eval": _digest(self.eval_examples),
        }
        if self.run.config.teacher.kind == "model" and isinstance(self.run.teacher.source, nn.Module):
            found["teacher.path"] = fingerprint(sorted(self.run.teacher.source.named_parameters()))
        return found


def _digest(examples: Sequence[Example]) -> str:
    """Of all that training or a scorer may read of `examples`."""
    digest = hashlib.sha256()
    for example in examples:
        row = example.row
        read = (example.student, example.teacher, row.problem, row.solution, row.answer, row.teacher_prompt, row.record)
        digest.update(json.dumps(read, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def set_up(config: Config, make: MakeTeacher = make_teacher) -> Setup:
    """Reads the data, loads the model and makes its teacher. Fixes the global random state by `run.seed`.

    Raises:
        ConfigError: something does not fit (`DataError` for a row).
        TypeError, ValueError: `make` gave no teacher; the message says what is wrong.
    """
    device = models.pick_device(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    scorer = scorer_of(config)
    seed_all(config.run.seed)
    tokenizer = models.load_tokenizer(config.model.path)
    prompter = Prompter(tokenizer, config.prompts)
    data = {"train": read_examples(config, prompter, config.data.train or "", required=("problem", "solution"))}
    if config.data.eval:
        required = ("problem", "answer")
        data["eval"] = read_examples(
            config, prompter, config.data.eval, required=required, most=config.eval.max_problems
        )
    counts: dict[str, int] = {}
    warnings = unused_options(config)
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
                warnings.append(name_rows(f"{len(rows)} rows of data.{name} {what}:", rows))
    examples = data["train"].examples
    eval_examples = data["eval"].examples if "eval" in data else []

    model = models.load_model(config, device)
    _check_context(config, model, [*examples, *eval_examples])
    ends = models.end_ids(model, tokenizer)
    pad = models.pad_id(tokenizer, ends)
    try:
        head = lm_head_of(model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.path {config.model.path!r}: {error}") from error
    teacher = make(config, model, tokenizer)
    check_teacher(teacher)
    packed, how = _packing(config, model, teacher)
    run = Run(config, model, tokenizer, head, teacher, device, ends, pad, packed)
    if config.model.dtype == "bfloat16" and not config.lora.enabled:
        warnings.append("full training of bfloat16 weights loses small updates; model.dtype float32 keeps them")
    if config.optim.warmup_steps >= config.optim.steps:
        reached = learning_rate(config.optim, config.optim.steps)
        warnings.append(f"optim.warmup_steps is not below optim.steps: the learning rate never passes {reached:.3g}")
    told = sum(bool(example.teacher) for example in eval_examples)
    if told < len(eval_examples):
        warnings.append(
            f"the teacher is not evaluated: {len(eval_examples) - told} rows of data.eval have nothing for it to read"
        )
    return Setup(run, prompter, scorer, examples, eval_examples, counts, [how], warnings)


def check_objective(run: Run) -> None:
    """Tries the loss of `run` on two rows, so that what it refuses shows before the first step.

    Raises:
        ConfigError: the kernels refuse an option of `objective` on this model or machine.
    """
    student, teacher = (head.weight.new_zeros(2, head.weight.shape[1]) for head in (run.head, run.teacher.head))
    rollout = Rollout([0, 0], truncated=True, logprobs=[0.0, 0.0])
    try:
        with torch.no_grad(), models.autocast(run.config, run.device):
            token_divergence(run, student, teacher, [rollout], 2)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"objective: {error}") from error


def seed_all(seed: int) -> None:
    """Seeds the generators of torch (all devices), Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def absolute_paths(config: Config) -> Config:
    """`config` with its local paths made independent of the working directory."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    scorer = config.eval.scorer
    file, colon, name = scorer.rpartition(":")
    if colon and file.endswith(".py"):
        scorer = f"{absolute(file)}:{name}"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=absolute(config.model.path)),
        data=dataclasses.replace(config.data, train=absolute(config.data.train), eval=absolute(config.data.eval)),
        teacher=dataclasses.replace(config.teacher, path=absolute(config.teacher.path)),
        eval=dataclasses.replace(config.eval, scorer=scorer),
    )


def describe_run(setup: Setup) -> dict[str, Any]:
    """What `run.json` holds: the run's own id, when it was started, on what, and `Setup.identity`."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"id": uuid.uuid4().hex, "created": now, **_environment(setup.run.device), "identity": setup.identity()}


def _environment(device: torch.device) -> dict[str, Any]:
    packages = {}
    for name in ("torch", "transformers", "peft", "triton", "opsd"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "packages": packages,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def check_identity(
    setup: Setup, identity: Mapping[str, str], described: Mapping[str, Any], *, same_evaluation: bool = True
) -> list[str]:
    """Whether model, teacher and data are those that the run of `run.json` began with.

    Args:
        identity: of `setup`, before anything was restored.
        same_evaluation: whether the options that choose the rows of data.eval are the same, too.

    Returns:
        What else is not as it was, so that the run goes on a little differently.

    Raises:
        ConfigError: one of them has changed, so that a resumed run would be another one.
    """
    began = described.get("identity") or {}
    for name, value in identity.items():
        if began.get(name) != value and (same_evaluation or name != "data.eval"):
            raise ConfigError(
                f"what {name} names has changed since the run began: its digest was {began.get(name)!r}, now {value!r}"
            )
    return [
        f"the run began with {name} {described.get(name)}, now it is {value}: from here it may differ a little"
        for name, value in _environment(setup.run.device).items()
        if described.get(name) != value
    ]


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
    display.note(_kind_of_training(run.config))
    counted = {name: count for name, count in setup.counts.items() if count}
    display.note("; ".join(f"{name.replace('_', ' ')} {count}" for name, count in counted.items()))
    for name, ids in (("student", example.student), ("teacher", example.teacher)):
        display.note(f"--- first {name} prompt, {len(ids)} tokens ---\n{run.tokenizer.decode(ids)}")
    display.note("---")
    for note in setup.notes:
        display.note(note)
    for warning in setup.warnings:
        display.warn(warning)


def _kind_of_training(config: Config) -> str:
    lora = config.lora
    named = [f"preset {config.preset}"] if config.preset else []
    kind = f"LoRA r {lora.r} alpha {lora.alpha}" if lora.enabled else "full training"
    return "; ".join([*named, kind, f"lr {config.optim.lr:g}"])


def _check_context(config: Config, model: nn.Module, examples: Sequence[Example]) -> None:
    """A model run beyond its positions degrades without a word, or fails in the middle of a run."""
    limit = models.decoder_limit(model)
    new = max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)
    added = f"rollout.max_new_tokens adds {new}"
    if config.teacher.reason_first:
        new += config.teacher.reason_max_new_tokens
        added += f", teacher.reason_max_new_tokens {config.teacher.reason_max_new_tokens}"
    longest = max(max(map(len, (example.student, example.teacher, example.reason))) for example in examples)
    if limit is not None and longest + new > limit:
        raise DataError(
            f"the longest prompt has {longest} tokens and {added}, but the model has {limit} "
            "positions; lower data.max_prompt_tokens (with data.too_long drop) or what is added"
        )


def _packing(config: Config, model: nn.Module, teacher: Teacher) -> tuple[bool, str]:
    """Whether both contexts run as packed rows, and a line that says how. A few tokens are tried: some of what a model
    does that packed rows cannot give it shows only then.

    Raises ConfigError if they are to and the model does not allow it.
    """
    if config.model.packing == "off":
        return False, "scoring: padded, as asked"
    try:
        model.train()
        device = next(model.parameters()).device
        few = pack_dual_context([[0, 0]], [[0, 0, 0]], [[[0, 0], [0]]])
        forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with forked, models.autocast(config, device):  # the run draws as it would without this
            plan = plan_passes(model, teacher=teacher.source)
            dual_hidden_states(model, few, teacher=teacher.source)
    except (TypeError, ValueError) as error:
        if config.model.packing == "on":
            raise ConfigError(f"model.packing is on, but {error}") from error
        return False, f"scoring: padded, since {error}"
    how = f"scoring: packed rows, student and teacher in {'one pass' if plan.passes == 'joint' else 'two passes'}"
    return True, f"{how} ({plan.reason})" if config.model.packing == "on" else how
