"""The recipe of a run, by its options."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from opsd import models, recipes
from opsd.config import Config
from opsd.contexts import reads_step, templates_of
from opsd.errors import ConfigError, config_error
from opsd.recipes.importance import ImportanceWeighted
from opsd.recipes.in_loop import SUPPLIED, InLoop, lacking, why_lacking
from opsd.rewards import REWARDED
from opsd.rollouts import Rollout
from opsd.run import Recipe, Run
from opsd.scoring import stream_of
from opsd.top_k import TopKTeacher


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
        recipe = _of_the_family(objective.recipe, config)
    if reads_siblings(config, recipe) and config.rollout.per_prompt == 1:
        raise ConfigError(
            "rollout.per_prompt is 1, but a context reads another rollout of the same prompt (prompts.contexts); "
            "accepted: 2 or more"
        )
    return recipe if cap is None else ImportanceWeighted(recipe, cap)


def reads_siblings(config: Config, recipe: Recipe) -> bool:
    """Whether a context of `recipe` reads another rollout of the same prompt."""
    return any(map(reads_step, templates_of(config.prompts.contexts, recipe.contexts).values()))


def _of_the_family(name: str, config: Config) -> InLoop:
    objective = config.objective
    with config_error("objective.recipe_options", ValueError, TypeError):
        options = json.loads(objective.recipe_options or "{}")
        if not isinstance(options, dict):
            raise ValueError(f"got {objective.recipe_options!r}; accepted: a JSON object")
    with config_error("objective.recipe", ValueError, TypeError):
        shared = {"backend": objective.backend, "workspace_bytes": objective.workspace_bytes}
        recipe = recipes.make(name, **{**shared, **options})
    if missing := lacking(recipe):
        raise ConfigError(
            f"objective.recipe {name} needs {', '.join(missing)}, which the training loop does not supply "
            f"({why_lacking(recipe)}); "
            "opsd.recipes.make gives its token loss for a trainer of your own"
        )
    if "base" in recipe.contexts and config.teacher.kind != "base":
        raise ConfigError(
            f"objective.recipe {name} reads the initial model: teacher.kind must be 'base', not {config.teacher.kind!r}"
        )
    shuffles = sum(name.startswith("shuffled_") for name in recipe.contexts)
    if shuffles >= config.optim.batch_size:
        raise ConfigError(
            f"objective.recipe {name} reads the problems of {shuffles} other rows of the step: optim.batch_size must "
            f"be at least {shuffles + 1}, not {config.optim.batch_size}"
        )
    each = config.rollout.per_prompt
    if recipe.batch_wide and config.optim.micro_batch_size < config.optim.batch_size * each:
        raise ConfigError(
            f"objective.recipe {name} compares all tokens of a step: optim.micro_batch_size must be at least "
            f"{config.optim.batch_size * each}, optim.batch_size times rollout.per_prompt, "
            f"not {config.optim.micro_batch_size}"
        )
    if "advantage" in recipe.needs and each == 1 and objective.advantage != "raw":
        raise ConfigError(
            f"objective.recipe {name} compares the rollouts of a prompt: rollout.per_prompt must be at least 2, "
            "or objective.advantage 'raw'"
        )
    return InLoop(recipe, objective.temperature, objective.reduction)


def needs_reward(config: Config) -> bool:
    """Whether the recipe has rollouts of training scored."""
    name = config.objective.recipe
    if name is not None and not REWARDED.isdisjoint(_of_the_family(name, config).recipe.needs):
        return True
    return reads_siblings(config, make_recipe(config))


def supplied(values: Tensor, contexts: Sequence[str]) -> dict[str, Any]:
    """The fields of a batch that the loop fills in, for a trial: `values` (N,) for those by token."""
    teachers = sum(name.startswith("teacher_") for name in contexts)
    by_token = [name for name in SUPPLIED if name not in ("step", "progress", "confidence")]
    confidence = values[:, None].expand(-1, teachers)
    return {"step": 0, "progress": 0.0, "confidence": confidence, **dict.fromkeys(by_token, values)}


def check_recipe(run: Run) -> None:
    """Tries the recipe of `run` on two rows, so that what it refuses shows before the first step.

    Raises:
        ConfigError: the kernels refuse an option of `objective` on this model or machine.
    """
    student, teacher = (
        stream_of(head.weight.new_zeros(2, head.weight.shape[1]), head) for head in (run.head, run.teacher.head)
    )
    known: Any = teacher
    if isinstance(run.teacher, TopKTeacher):
        known = run.teacher.unasked().top_k([], [Rollout([0, 0], False)])
    zeros = torch.zeros(2, dtype=torch.int64, device=run.device)
    batch = recipes.TokenBatch(target_ids=zeros, sequence_ids=zeros, **supplied(zeros.float(), run.recipe.contexts))
    with (
        config_error("objective", TypeError, ValueError),
        torch.no_grad(),
        models.autocast(run.config.model, run.device),
    ):
        run.recipe.loss(student, dict.fromkeys(("teacher", *run.recipe.contexts), known), batch, 2)
