"""Whether a model gives in a batch, padded or packed, what it gives alone: tried at set-up, on contexts as long as the
run needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opsd.engines import GenerateEngine
from opsd.errors import ConfigError
from opsd.models import autocast, causal_lm, positions
from opsd.options import ModelConfig
from opsd.run import Teacher
from opsd.scoring import rollout_hidden
from opsd_kernels.packing import plan_passes
from opsd_kernels.packing.prove import rounding
from opsd_kernels.packing.vet import crossed_border, trial_length
from opsd_kernels.probe import as_computed, no_trial, undisturbed


class Scoring(NamedTuple):
    """How rollouts are scored: what `opsd.run.Run` calls by these names, and a line that says why."""

    how: str
    packed: bool = False
    joint: bool = False
    alone: bool = False


NEW = 3  # tokens that are written, or scored, after each prompt of a trial


def tried_engine(engine: GenerateEngine, longest: int, model: nn.Module, teacher: Any = None) -> GenerateEngine:
    """`engine`, made to continue one prompt at a time if with `model`, or a `teacher` that is a model of its own, what
    it writes depends on the prompts beside it. `longest`: tokens of the longest context of the run."""
    source = getattr(teacher, "source", None)
    for one in (model, *([source] if isinstance(source, nn.Module) else [])):
        if why := _writes_alone(engine, causal_lm(one), longest):
            return replace(engine, alone=why)
    return engine


def _writes_alone(engine: GenerateEngine, lm: Any, longest: int) -> str | None:
    def compare(prompts: list[list[int]], new: list[int]) -> str | None:
        together = as_computed(lm, engine.scores(lm, prompts, new))
        alone = [as_computed(lm, engine.scores(lm, [prompt], new)[0]) for prompt in prompts]
        differ = any(map(_off, together, alone))
        return f"{type(lm).__name__} continues padded prompts otherwise than single ones" if differ else None

    return _tried(lm, longest, engine.end_ids, compare)


def writing_note(engine: GenerateEngine) -> list[str]:
    """Lines that say why prompts are continued one at a time, if they are, and which ids are never written."""
    alone = [f"writing: one prompt at a time, since {engine.alone}"] if engine.alone else []
    if not engine.holes:
        return alone
    count, first = len(engine.holes), engine.holes[0]
    ids = f"{count} ids, {first} first, have" if count > 1 else f"id {first} has"
    return [*alone, f"vocabulary: {ids} no token: never written, and in no softmax"]


def choose_scoring(options: ModelConfig, model: nn.Module, teacher: Teacher, longest: int = 0) -> Scoring:
    """Whether all contexts run as packed rows, else whether one rollout at a time. Either is tried on contexts that
    show all that one of `longest` tokens would.

    Raises:
        ConfigError: rows are to be packed and the model does not allow it; or it is not causal.
    """
    reason = "as asked"
    if options.packing != "off":
        try:
            return _packed(options, model, teacher, longest)
        except (TypeError, ValueError) as error:
            if options.packing == "on":
                raise ConfigError(f"model.packing is on, but {error}") from error
            reason = f"since {error}"
    theirs = [("teacher.path", teacher.source)] if isinstance(teacher.source, nn.Module) else []
    for name, one in (("model.path", model), *theirs):
        if why := _scores_alone(one, longest, f"{name} {causal_lm(one).name_or_path!r}"):
            also = "" if why in reason else f"; not packed, {reason}"
            return Scoring(f"scoring: one rollout at a time, since {why}{also}", alone=True)
    return Scoring(f"scoring: padded, {reason}")


def _packed(options: ModelConfig, model: nn.Module, teacher: Teacher, longest: int) -> Scoring:
    """How packed rows run.

    Raises:
        TypeError, ValueError: they cannot.
    """
    model.train()
    student_alone = teacher.source is None
    with autocast(options, next(model.parameters()).device):
        source, passes = teacher.source or "live", "two" if student_alone else "auto"
        plan = plan_passes(model, teacher=source, passes=passes, longest=longest)
    if student_alone:
        return Scoring(f"scoring: packed rows of the student alone ({plan.reason})", packed=True)
    joint = plan.passes == "joint"
    how = f"scoring: packed rows, student and teacher in {'one pass' if joint else 'two passes'} ({plan.reason})"
    return Scoring(how, packed=True, joint=joint)


def _scores_alone(model: nn.Module, longest: int, where: str) -> str | None:
    """Why rows of hidden states have to be computed for one rollout at a time; None where padded batches serve.

    Raises:
        ConfigError: what a row holds depends on the tokens after it, so that it predicts nothing; begins with `where`.
    """

    def compare(prompts: list[list[int]], new: list[int]) -> str | None:
        def rows(some: list[list[int]], after: list[int]) -> Tensor:
            return as_computed(causal_lm(model), rollout_hidden(model, some, [after] * len(some)))

        together = rows(prompts, new).split(len(new))
        alone = [rows([prompt], new) for prompt in prompts]
        begun = [rows([prompt], new[:-1]) for prompt in prompts]
        if any(map(_off, (own[: len(new) - 1] for own in alone), begun)):
            raise ConfigError(
                f"{where}: what {type(causal_lm(model)).__name__} computes for a token depends on the tokens after it; "
                "accepted: a causal language model"
            )
        differ = any(map(_off, together, alone))
        return "in a padded batch its hidden states are not those of single passes" if differ else None

    return _tried(model, longest, [causal_lm(model).config.get_text_config().pad_token_id], compare)


def _tried(
    model: nn.Module,
    longest: int,
    without: Sequence[int | None],
    compare: Callable[[list[list[int]], list[int]], str | None],
) -> str | None:
    """What `compare` says of prompts of several lengths and what is to follow them, all of other ids than those of
    `without`; or what the config says."""
    lm = causal_lm(model)
    config = lm.config.get_text_config()
    if border := crossed_border(config, longest):
        return border
    if no_trial(lm):
        return None
    count = lm.get_input_embeddings().weight.shape[0]
    length = min(trial_length(config, longest), positions(lm) or longest)
    ids = _ids(min(count, getattr(config, "vocab_size", count)), without)
    new = [next(ids) for _ in range(NEW)]
    prompts = [[next(ids) for _ in range(n)] for n in (2, 7, length - NEW) if 0 < n <= length - NEW]
    with undisturbed(lm, next(lm.parameters()).device), torch.no_grad():
        return compare(prompts, new)


def _ids(count: int, without: Sequence[int | None]) -> Iterator[int]:
    """Token ids below `count`, but for those of `without`, as many as are asked for."""
    usable = [i for i in ((place * count + count // 2) // 23 for place in range(23)) if i not in without] or [0]
    place = 0
    while True:
        place += 1
        yield usable[place * place % len(usable)]


def _off(got: Tensor, want: Tensor) -> bool:
    """Whether rows (N, ...) differ by more than rounding. In 16 bits a router may send single rows elsewhere, so there
    the median decides."""
    limit = rounding(want.dtype)
    hidden = want.isfinite()  # a head may mask columns with infinities
    errors = (got - want).where(hidden, 0).double().norm(dim=-1)
    errors = (errors / want.where(hidden, 0).double().norm(dim=-1).clamp_min(1e-30)).nan_to_num(torch.inf)
    return bool((errors.median() if limit == 0.1 else errors.max()) > limit)
