"""From a configuration to all that a run works with: data, model, teacher, and how they are scored."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import set_seed

from opsd import models, recipes, tiny
from opsd.config import Config, unused_options
from opsd.data import name_rows
from opsd.display import Display
from opsd.engines import GenerateEngine
from opsd.errors import ConfigError, config_error
from opsd.evaluation import Evaluator
from opsd.limits import PATHS
from opsd.optim import learning_rate
from opsd.options import ModelConfig, ObjectiveConfig
from opsd.plugins import Evaluate, Parts, UserEngine, UserLoss, UserTeacher
from opsd.prompts import Encoded, Example, Prompter, read_examples
from opsd.recipes.importance import ImportanceWeighted
from opsd.recipes.in_loop import InLoop, lacking
from opsd.run import Recipe, Run, Step, Teacher
from opsd.scorers import scorer_of
from opsd.scoring import stream_of
from opsd.step import opsd_step
from opsd.teachers import make_teacher
from opsd.vocabulary import check_prompts, without_padding
from opsd.weights import check_savable
from opsd_kernels import lm_head_of
from opsd_kernels.packing import plan_passes


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


def set_up(config: Config, parts: Parts, date: datetime | None = None) -> Setup:
    """Reads the data, loads the model and makes its teacher. Fixes the global random state by `run.seed`.

    `date` is when the run began, for prompts that hold it; None: now.

    Raises:
        ConfigError: something does not fit (`DataError` for a row).
        TypeError, ValueError: `parts.teacher` gave no teacher; the message says what is wrong.
    """
    recipe = make_recipe(config)
    device = models.pick_device(config.run.device)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    scorer = scorer_of(config.eval)
    set_seed(config.run.seed % 2**32)
    tokenizer = models.load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    prompter = Prompter(tokenizer, config.prompts, date)
    data = _read(config, prompter)
    examples, eval_examples = data["train"].examples, data["eval"].examples if "eval" in data else []

    model = models.load_model(config.model, config.lora, device)
    if not config.lora.enabled:  # adapters are saved without it
        check_savable(models.causal_lm(model).config, f"model.path {config.model.path!r}")
    added = {"rollout.max_new_tokens": max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)}
    if config.teacher.reason_first:
        added["teacher.reason_max_new_tokens"] = config.teacher.reason_max_new_tokens
    prompts = [ids for e in [*examples, *eval_examples] for ids in (e.student, e.teacher, e.reason)]
    models.check_positions(model, prompts, added)
    check_prompts(models.causal_lm(model), tokenizer, [*examples, *eval_examples])
    engine = GenerateEngine.of(model, tokenizer, config.model)
    engine.check(model, f"model.path {config.model.path!r}")
    with config_error(f"model.path {config.model.path!r}", TypeError, ValueError):
        head = without_padding(lm_head_of(model), tokenizer)
    teacher: Any = (parts.teacher or make_teacher)(config, model, tokenizer)
    if parts.teacher is not None:
        teacher = UserTeacher(teacher)
    packed, how = choose_packing(config.model, model, teacher)
    run = Run(config, model, tokenizer, head, teacher, engine, recipe, device, packed)
    if parts.rollouts is not None:
        run = replace(run, engine=UserEngine(parts.rollouts, engine))
    if parts.loss is None:
        check_recipe(run)
    else:
        run = replace(run, recipe=cast(Recipe, UserLoss(parts.loss, run)))
    evaluator = Evaluator.of(config.eval, config.rollout.max_new_tokens, config.run.seed, tokenizer, engine, scorer)
    return Setup(
        run,
        parts.step or opsd_step,
        parts.evaluate or evaluator,
        prompter,
        examples,
        eval_examples,
        _counts(data),
        [how],
        [*_warnings(config, data), *_ignored(config, parts), *_ended(data, engine.end_ids)],
    )


def _read(config: Config, prompter: Prompter) -> dict[str, Encoded]:
    """The examples of data.train, and of data.eval where it is given."""
    read = partial(read_examples, config.data, prompter, reason=config.teacher.reason_first)
    data = {"train": read(config.data.train or "", required=("problem", "solution"))}
    if config.data.eval:
        data["eval"] = read(config.data.eval, required=("problem", "answer"), most=config.eval.max_problems)
    return data


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


def make_recipe(config: Config) -> Recipe:
    """The recipe of the options of `objective`, with the weights of `rollout.importance_cap` where it is on.

    Raises:
        ConfigError: `objective.recipe` is no recipe that the loop has all for, or its options are wrong.
    """
    objective, cap = config.objective, config.rollout.importance_cap
    recipe: Any
    if objective.recipe is None:
        names = [option.name for option in fields(recipes.FORMS[objective.form])]
        recipe = recipes.FORMS[objective.form](**{name: getattr(objective, name) for name in names})
    else:
        recipe = _of_the_family(objective.recipe, objective)
    return recipe if cap is None else ImportanceWeighted(recipe, cap)


def _of_the_family(name: str, objective: ObjectiveConfig) -> InLoop:
    with config_error("objective.recipe_options", ValueError, TypeError):
        options = json.loads(objective.recipe_options or "{}")
        if not isinstance(options, dict):
            raise ValueError(f"got {objective.recipe_options!r}; accepted: a JSON object")
    with config_error("objective.recipe", ValueError, TypeError):
        shared = {"backend": objective.backend, "workspace_bytes": objective.workspace_bytes}
        recipe = recipes.make(name, **{**shared, **options})
    if missing := lacking(recipe):
        raise ConfigError(
            f"objective.recipe {name} needs {', '.join(missing)}, which the training loop does not supply; "
            "opsd.recipes.make gives its token loss for a trainer of your own"
        )
    return InLoop(recipe, objective.temperature, objective.reduction)


def check_recipe(run: Run) -> None:
    """Tries the recipe of `run` on two rows, so that what it refuses shows before the first step.

    Raises:
        ConfigError: the kernels refuse an option of `objective` on this model or machine.
    """
    student, teacher = (
        stream_of(head.weight.new_zeros(2, head.weight.shape[1]), head) for head in (run.head, run.teacher.head)
    )
    zeros = torch.zeros(2, dtype=torch.int64, device=run.device)
    batch = recipes.TokenBatch(target_ids=zeros, sequence_ids=zeros, sampler_logprobs=zeros.float())
    with (
        config_error("objective", TypeError, ValueError),
        torch.no_grad(),
        models.autocast(run.config.model, run.device),
    ):
        run.recipe.loss(student, {"teacher": teacher}, batch, 2)


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
    run, example, lora = setup.run, setup.examples[0], setup.run.config.lora
    total = sum(p.numel() for p in run.model.parameters())
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    preset = f"preset {run.config.preset}; " if run.config.preset else ""
    kind = f"LoRA r {lora.r} alpha {lora.alpha}" if lora.enabled else "full training"
    prompts = [
        f"--- first {name} prompt, {len(ids)} tokens ---\n{run.tokenizer.decode(ids)}"
        for name, ids in (("student", example.student), ("teacher", example.teacher))
    ]
    for note in (
        f"run directory {run_dir}; {run.device.type}; {trained:,} of {total:,} parameters are trained",
        f"{preset}{kind}; lr {run.config.optim.lr:g}",
        "; ".join(f"{name.replace('_', ' ')} {count}" for name, count in setup.counts.items() if count),
        *prompts,
        "---",
        *setup.notes,
    ):
        display.note(note)
    for warning in setup.warnings:
        display.warn(warning)


def choose_packing(options: ModelConfig, model: nn.Module, teacher: Teacher) -> tuple[bool, str]:
    """Whether both contexts run as packed rows, and a line that says how; `plan_passes` tries a few tokens.

    Raises:
        ConfigError: they are to, and the model does not allow it.
    """
    if options.packing == "off":
        return False, "scoring: padded, as asked"
    try:
        model.train()
        with models.autocast(options, next(model.parameters()).device):
            plan = plan_passes(model, teacher=teacher.source)
    except (TypeError, ValueError) as error:
        if options.packing == "on":
            raise ConfigError(f"model.packing is on, but {error}") from error
        return False, f"scoring: padded, since {error}"
    how = f"scoring: packed rows, student and teacher in {'one pass' if plan.passes == 'joint' else 'two passes'}"
    return True, f"{how} ({plan.reason})"
