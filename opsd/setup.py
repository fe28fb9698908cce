"""From a configuration to all that a run works with: data, model, teacher, and how they are scored."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from transformers import set_seed

from opsd import models, tiny
from opsd.batching import choose_scoring, tried_engine, writing_note
from opsd.config import Config, unused_options
from opsd.data import name_rows, read_rows
from opsd.display import Display
from opsd.engines import GenerateEngine
from opsd.engines.vllm import with_vllm
from opsd.errors import ConfigError, config_error
from opsd.evaluation import Evaluator
from opsd.limits import PATHS
from opsd.model_path import check_path
from opsd.objective import check_recipe, make_recipe, needs_reward, reads_siblings
from opsd.optim import learning_rate
from opsd.options import ModelConfig
from opsd.plugins import Evaluate, Parts, UserEngine, UserLoss, UserTeacher
from opsd.prompts import Encoded, Example, Prompter, decoded, encode_read
from opsd.run import Recipe, Run, Step
from opsd.scorers import scorer_of
from opsd.step import opsd_step
from opsd.teacher_cache import with_cache
from opsd.teachers import make_teacher
from opsd.vocabulary import check_prompts, of_tokens
from opsd.weights import check_savable
from opsd_kernels import Head, lm_head_of

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """A run that is ready for its first step. `notes` say how it will be done, `warnings` what may be a mistake."""

    run: Run
    step: Step
    evaluate: Evaluate
    prompter: Prompter
    examples: list[Example]
    eval_examples: list[Example]
    counts: dict[str, int]
    notes: list[str]
    warnings: list[str]


class Attempt(Protocol):
    def __call__(self, name: str, make: Callable[..., T], /, *given: Any) -> T:
        """The part `name` of a set-up: `make(*given)`, where `given` holds all that it needs of other parts."""


def at_once(name: str, make: Callable[..., T], /, *given: Any) -> T:
    """The first part that cannot be made stops the set-up."""
    return make(*given)


def set_up(config: Config, parts: Parts, date: datetime | None = None, attempt: Attempt = at_once) -> Setup:
    """Reads the data, loads the model and makes its teacher. Fixes the global random state by `run.seed`.

    `date` is when the run began, for prompts that hold it; None: now. `attempt` may go on where a part is missing.

    Raises:
        ConfigError: something does not fit (`DataError` for a row).
        TypeError, ValueError: `parts.teacher` gave no teacher; the message says what is wrong.
    """
    recipe = attempt("recipe", make_recipe, config)
    device = attempt("device", _device, config)
    scorer = attempt("scorer", scorer_of, config.eval)
    set_seed(config.run.seed % 2**32)
    options = attempt("path", _model_options, config)
    tokenizer = attempt(
        "tokenizer", lambda o: models.load_tokenizer(o.path, trust_remote_code=o.trust_remote_code), options
    )
    prompter = attempt("prompter", _prompter, tokenizer, config, date)
    read = partial(read_rows, columns=config.data.columns, skip_bad_rows=config.data.skip_bad_rows)
    encode = partial(encode_read, config.data, reason=config.teacher.reason_first)
    rows = attempt("train rows", partial(read, required=_required(config)), config.data.train or "")
    encoded = [attempt("train", encode, prompter, rows)]
    if config.data.eval:
        rows = attempt("eval rows", partial(read, required=("problem", "answer")), config.data.eval)
        of_eval = partial(encode, most=config.eval.max_problems)
        encoded.append(attempt("eval", lambda p, rows: of_eval(p.for_evaluation(), rows), prompter, rows))

    model = attempt("model", models.load_model, options, config.lora, device)
    longest = attempt("fit", _check_fit, config, model, tokenizer, *encoded)
    engine = attempt("engine", GenerateEngine.of, model, tokenizer, options)
    attempt("writes", GenerateEngine.check, engine, model, f"model.path {config.model.path!r}")
    head = attempt("head", _head, config, model, tokenizer)
    teacher: Any = attempt("teacher", parts.teacher or make_teacher, config, model, tokenizer)
    teacher = teacher if parts.teacher is None else UserTeacher(teacher, tokenizer)
    tried = attempt("writing", tried_engine, engine, longest, model, teacher)
    engine = attempt("vllm", with_vllm, config, tried, model, longest)
    engine = attempt("rollouts", with_cache, engine, teacher, encoded[0])
    scoring = attempt("scoring", choose_scoring, options, model, teacher, longest)
    packed, joint, alone = (attempt(name, attrgetter(name), scoring) for name in ("packed", "joint", "alone"))
    reward = attempt("reward", lambda _, scorer: scorer if needs_reward(config) else None, recipe, scorer)
    known = (config, model, tokenizer, head, teacher, engine, recipe, device, packed, joint, alone, reward, prompter)
    run = attempt("run", Run, *known)
    run = attempt("run", _with_parts, run, parts)
    new, seed = config.rollout.max_new_tokens, config.run.seed
    evaluator = attempt("evaluator", Evaluator.of, config.eval, new, seed, tokenizer, engine, scorer)
    notes = attempt("notes", lambda scoring, engine: [scoring.how, *writing_note(engine)], scoring, tried)
    return attempt("setup", _finished, run, parts, evaluator, prompter, notes, *encoded)


def _device(config: Config) -> torch.device:
    device = models.pick_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    return device


def _prompter(tokenizer: Any, config: Config, date: datetime | None) -> Prompter:
    contexts: Sequence[str] = ()
    with suppress(ConfigError):  # of the recipe, which is told by itself
        contexts = [name for name in make_recipe(config).contexts if name != "teacher"]
    return Prompter(tokenizer, config.prompts, date, contexts)


def _required(config: Config) -> tuple[str, ...]:
    """The fields of a row of data.train."""
    with suppress(ConfigError):
        if needs_reward(config) and config.eval.scorer in ("exact", "math_verify"):
            return ("problem", "solution", "answer")
    return ("problem", "solution")


def _model_options(config: Config) -> ModelConfig:
    if config.model.path:
        check_path(config.model.path, "model.path")
    return config.model


def _check_fit(config: Config, model: nn.Module, tokenizer: Any, *data: Encoded) -> int:
    """Checks lengths and ids of the prompts; how many tokens the longest context of the run can have."""
    if not config.lora.enabled:  # adapters are saved without it
        check_savable(models.causal_lm(model).config, f"model.path {config.model.path!r}")
    added = {"rollout.max_new_tokens": max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)}
    if config.teacher.reason_first:
        added["teacher.reason_max_new_tokens"] = config.teacher.reason_max_new_tokens
    with suppress(ConfigError):  # of the recipe, which is told by itself
        if reads_siblings(config, make_recipe(config)):
            added["rollout.max_new_tokens, read again"] = config.rollout.max_new_tokens
    examples = [example for one in data for example in one.examples]
    prompts = [ids for e in examples for ids in (e.student, e.teacher, e.reason, *e.contexts.values())]
    longest = models.check_positions(model, prompts, added)
    check_prompts(models.causal_lm(model), tokenizer, examples)
    return longest


def _head(config: Config, model: nn.Module, tokenizer: Any) -> Head:
    with config_error(f"model.path {config.model.path!r}", TypeError, ValueError):
        return of_tokens(lm_head_of(model), tokenizer)


def _with_parts(run: Run, parts: Parts) -> Run:
    """`run` with what the user puts in place of its parts; its own recipe is tried."""
    if parts.rollouts is not None:
        run = replace(run, engine=UserEngine(parts.rollouts, run.engine))
    if parts.loss is not None:
        return replace(run, recipe=cast(Recipe, UserLoss(parts.loss, run)))
    check_recipe(run)
    return run


def _finished(
    run: Run, parts: Parts, evaluator: Evaluator, prompter: Prompter, notes: list[str], *encoded: Encoded
) -> Setup:
    data = dict(zip(("train", "eval"), encoded, strict=False))
    return Setup(
        run,
        parts.step or opsd_step,
        parts.evaluate or evaluator,
        prompter,
        data["train"].examples,
        data["eval"].examples if "eval" in data else [],
        _counts(data),
        notes,
        [*_warnings(run.config, data), *_ignored(run.config, parts), *_ended(data, run.engine.end_ids)],
    )


def _counts(data: Mapping[str, Encoded]) -> dict[str, int]:
    counts = {}
    for name, (examples, too_long, skipped) in data.items():
        counts[f"{name}_rows"] = len(examples)
        counts[f"{name}_rows_skipped"] = len(skipped)
        counts[f"{name}_rows_too_long"] = len(too_long)
    return counts


def _warnings(config: Config, data: Mapping[str, Encoded]) -> list[str]:
    """What may be a mistake."""
    warnings = unused_options(config)
    for name, (_, too_long, skipped) in data.items():
        for what, rows in (("cannot be used and are skipped", skipped), ("are too long and dropped", too_long)):
            if rows:
                warnings.append(name_rows(f"{len(rows)} rows of data.{name} {what}:", rows))
    if config.model.dtype == "bfloat16" and not config.lora.enabled:
        warnings.append("full training of bfloat16 weights loses small updates; model.dtype float32 keeps them")
    if config.optim.warmup_steps >= config.optim.steps:
        reached = learning_rate(config.optim, config.optim.steps)
        warnings.append(f"optim.warmup_steps is not below optim.steps: the learning rate never passes {reached:.3g}")
    without = sum(not example.teacher for example in data["eval"].examples) if "eval" in data else 0
    if without:
        warnings.append(f"the teacher is not evaluated: {without} rows of data.eval have nothing for it to read")
    return warnings


def _ignored(config: Config, parts: Parts) -> list[str]:
    """Options in place of which the user has put a part."""
    cap = config.rollout.importance_cap
    if parts.loss is None or cap is None:
        return []
    return [f"rollout.importance_cap is {cap:g}, which weights no token, since the loss function (loss) is your own"]


def _ended(data: Mapping[str, Encoded], end_ids: Sequence[int]) -> list[str]:
    """A line for each kind of prompt that a chat template or a row's own text brings to an end."""
    lines = []
    for name, (examples, _, _) in data.items():
        for who in ("student", "teacher"):
            count = sum(getattr(example, who)[-1:] in [[end] for end in end_ids] for example in examples)
            if count:
                lines.append(f"{count} {who} prompts of data.{name} end with an end token, after which a model stops")
    return lines


def absolute_paths(config: Config) -> Config:
    """`config` with its local paths made independent of the working directory."""

    def absolute(path: Any) -> Any:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    options = config.options()
    paths = {name: absolute(options[name]) for name in PATHS}
    file, colon, name = config.eval.scorer.rpartition(":")
    if colon and file.endswith(".py"):
        paths["eval.scorer"] = f"{absolute(file)}:{name}"
    return config.changed(paths)


def embedded(config: Config, display: Display) -> Config:
    """`config` pointing at the embedded model and its data, made first if need be."""

    def on_step(step: int, total: int, loss: float) -> None:
        display.advance("preparing the embedded model", step, total, f"loss {loss:.3f}", every=max(1, total // 10))

    made = tiny.prepare(seed=config.run.seed, on_step=on_step)
    paths = {"model.path": "model", "data.train": "train.jsonl", "data.eval": "eval.jsonl"}
    return config.changed({name: str(made / file) for name, file in paths.items()})


def introduce(setup: Setup, run_dir: Path, display: Display) -> None:
    """Says what is about to happen, with the first prompts as the model reads them."""
    run, lora = setup.run, setup.run.config.lora
    total = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    preset = f"preset {run.config.preset}; " if run.config.preset else ""
    kind = f"LoRA r {lora.r} alpha {lora.alpha}" if lora.enabled else "full training"
    for note in (
        f"run directory {run_dir}; {run.device.type}; {trained:,} of {total:,} parameters are trained",
        f"{preset}{kind}; lr {run.config.optim.lr:g}",
        "; ".join(f"{name.replace('_', ' ')} {count}" for name, count in setup.counts.items() if count),
        *decoded(run.tokenizer, setup.examples[0]),
        *setup.notes,
    ):
        display.note(note)
    for warning in setup.warnings:
        display.warn(warning)
