"""One step of On-Policy Self-Distillation, to be read from the top:

    sample rollouts from the student -> score them in both contexts -> divergence -> backward

The teacher reads [its own prompt | rollout], the student [its prompt | rollout], the same ids of the rollout in both.
Only the rows that predict rollout tokens reach the lm_head, inside `opsd_kernels`, so that full logits never exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opsd.config import Config, ObjectiveConfig
from opsd.metrics import Clock
from opsd.models import autocast, body
from opsd.prompts import Example
from opsd.rollouts import Rollout, Sampling, derive_seed, generate
from opsd.scoring import rollout_hidden, rollout_index
from opsd.teachers import Teacher, check_hidden
from opsd_kernels import (
    Head,
    dual_hidden_states,
    jsd_loss,
    lm_head_of,
    pack_dual_context,
    token_logprobs,
    top_k_logprobs,
)
from opsd_kernels.packing import plan_passes


@dataclass(frozen=True)
class Run:
    """What a step works with. The trainer owns the optimiser; a step leaves gradients on `model`.

    `sample` and `divergence` are the two parts of `opsd_step` that may be replaced.
    """

    config: Config
    model: nn.Module
    tokenizer: Any
    head: Head
    teacher: Teacher
    device: torch.device
    end_ids: list[int]
    pad_id: int
    packed: bool = False
    sample: Sampler = field(default_factory=lambda: sample_rollouts)
    divergence: Divergence = field(default_factory=lambda: token_divergence)


@dataclass
class StepResult:
    """What a step did. `loss` and the tensors of `metrics` are 0-d and stay on the device.

    `rollouts` come prompt by prompt: those of example i are numbers i * G to (i + 1) * G - 1.
    """

    loss: Tensor
    tokens: int
    metrics: dict[str, Tensor | float] = field(default_factory=dict)
    clock: Clock | None = None
    rollouts: list[Rollout] = field(default_factory=list)


class Step(Protocol):
    """A whole step, in place of `opsd_step`: a function of (run, examples, number)."""

    def __call__(self, run: Run, examples: Sequence[Example], number: int, /) -> StepResult:
        """Adds the gradient of its loss to the parameters of `run.model`; numbers start at 1."""


class Sampler(Protocol):
    """What writes the rollouts, in place of `sample_rollouts`: a function of (run, examples, number)."""

    def __call__(self, run: Run, examples: Sequence[Example], number: int, /) -> list[Rollout]:
        """`rollout.per_prompt` rollouts of each example, all of the first example first.

        Each has at least one id, all of them within the vocabulary, and either every rollout has the sampler's
        log-probabilities or none does.
        """


class Divergence(Protocol):
    """The loss, in place of `token_divergence`: a function of (run, student_hidden, teacher_hidden, rollouts,
    denominator)."""

    def __call__(
        self,
        run: Run,
        student_hidden: Tensor,
        teacher_hidden: Tensor,
        rollouts: Sequence[Rollout],
        denominator: int,
        /,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What these rollouts contribute to the loss of the batch, 0-d with a gradient, and statistics, each (R,), the
        same names in every call; the step reports their means over the batch.

        R rows of hidden states, (R, H) each, predict the R tokens of `rollouts` in order. Called once for each
        micro-batch; divide by `denominator`, the batch's number of tokens (with objective.reduction "sequence_mean" of
        rollouts), so that the micro-batches add up.
        """


OWN_NAMES = ("step", "loss", "grad_norm")
"""What the trainer itself records of a step, so that nothing else may be called so."""


def opsd_step(run: Run, examples: Sequence[Example], number: int) -> StepResult:
    """Sample rollouts for each of `examples`, compare the two contexts on them, and go backward.

    The loss is that of the whole batch whatever `optim.micro_batch_size` is: each micro-batch divides by the count of
    tokens (or of rollouts) of the batch.

    Raises:
        TypeError, ValueError: `run.sample`, `run.divergence` or the teacher returned something that cannot be trained
            on; the message says what.
    """
    config, clock = run.config, Clock(run.device)

    with clock("rollout"):
        rollouts = checked(run, run.sample(run, examples, number), len(examples))
    per_prompt, lengths = config.rollout.per_prompt, [len(rollout.ids) for rollout in rollouts]
    tokens = sum(lengths)
    denominator = tokens if config.objective.reduction == "mean" else len(rollouts)

    loss: Tensor = torch.zeros((), device=run.device)
    sums: dict[str, Tensor] = {}
    metrics: dict[str, Tensor | float] = {}
    for chosen in micro_batches(lengths, config.optim.micro_batch_size, per_prompt if run.packed else 1):
        batch, written = [examples[i // per_prompt] for i in chosen], [rollouts[i] for i in chosen]
        student_hidden, teacher_hidden = score(run, batch, written, clock)
        with clock("loss"), autocast(config, run.device):
            returned = run.divergence(run, student_hidden, teacher_hidden, written, denominator)
            part, stats = checked_loss(returned, len(student_hidden), sums.keys() if metrics else None)
            if "top_k_overlap" not in metrics:  # on the first micro-batch only
                metrics["top_k_overlap"] = top_k_overlap(run, student_hidden, teacher_hidden)
        with clock("backward"):
            part.backward()
        loss = loss + part.detach()
        for name, value in stats.items():
            sums[name] = sums.get(name, 0.0) + value.detach().sum(dtype=torch.float64)

    metrics |= {name: total / tokens for name, total in sums.items()}
    metrics |= {
        "rollout_length": tokens / len(rollouts),
        "rollout_length_min": min(lengths),
        "rollout_length_max": max(lengths),
        "truncated": sum(rollout.truncated for rollout in rollouts) / len(rollouts),
        "teacher_context_length": sum(len(example.teacher) for example in examples) / len(examples),
    }
    return StepResult(loss, tokens, metrics, clock, rollouts)


def sample_rollouts(run: Run, examples: Sequence[Example], number: int) -> list[Rollout]:
    """`rollout.per_prompt` rollouts for each example from the student's prompt alone, by the weights as they are now.

    Each depends on run.seed, the step's number, the example's place in the batch and its own number, on nothing else.
    """
    options, seed = run.config.rollout, run.config.run.seed
    each = [(place, g) for place in range(len(examples)) for g in range(options.per_prompt)]
    with autocast(run.config, run.device):
        return generate(
            run.model,
            [examples[place].student for place, _ in each],
            Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.min_p),
            end_ids=run.end_ids,
            pad_id=run.pad_id,
            batch_size=options.batch_size,
            seeds=[derive_seed(seed, "rollout", number, place, g) for place, g in each],
        )


def checked(run: Run, rollouts: Sequence[Rollout], examples: int) -> list[Rollout]:
    """`rollouts` if they are what a `Sampler` has to return for so many examples; else an error that says what is
    wrong."""
    if not isinstance(rollouts, Iterable):
        raise TypeError(f"the sampler returned {type(rollouts).__name__}; accepted: a list of opsd.rollouts.Rollout")
    rollouts, each = list(rollouts), run.config.rollout.per_prompt
    if len(rollouts) != examples * each:
        raise ValueError(
            f"the sampler returned {len(rollouts)} rollouts for {examples} examples; accepted: {examples * each}, "
            f"rollout.per_prompt {each} of each, in the order of the examples"
        )
    vocab = run.head.weight.shape[0] if run.head.valid_vocab is None else run.head.valid_vocab
    for i, rollout in enumerate(rollouts):
        name = f"rollout {i % each} of example {i // each}"
        if not isinstance(rollout, Rollout):
            raise TypeError(f"{name} must be an opsd.rollouts.Rollout, got {type(rollout).__name__}")
        if not isinstance(rollout.ids, list | tuple):
            raise TypeError(f"{name} has ids of type {type(rollout.ids).__name__}; accepted: a list of ints")
        if not isinstance(rollout.logprobs, list | tuple | None):
            kind = type(rollout.logprobs).__name__
            raise TypeError(f"{name} has logprobs of type {kind}; accepted: a list of floats, or None")
        if not isinstance(rollout.truncated, bool):
            raise TypeError(f"{name} has truncated {rollout.truncated!r}; accepted: True or False")
        if not rollout.ids:
            raise ValueError(f"{name} is empty; a rollout has at least one token id, the end token if nothing else")
        for token in rollout.ids:
            if type(token) is not int or not 0 <= token < vocab:
                raise ValueError(f"{name} has token id {token!r}; accepted: ints from 0 to {vocab - 1}")
        if rollout.logprobs is not None and len(rollout.logprobs) != len(rollout.ids):
            raise ValueError(f"{name} has {len(rollout.ids)} ids and {len(rollout.logprobs)} logprobs")
        for logprob in rollout.logprobs or ():
            if not isinstance(logprob, Real):
                raise TypeError(f"{name} has the log-probability {logprob!r}; accepted: a float")
            if not math.isfinite(logprob):
                raise ValueError(f"{name} has the log-probability {logprob} for a token that was sampled")
    known = sum(rollout.logprobs is not None for rollout in rollouts)
    if 0 < known < len(rollouts):
        raise ValueError(f"{known} of {len(rollouts)} rollouts have logprobs; accepted: all or none")
    if not known and run.config.rollout.importance_cap is not None:
        raise ValueError(
            "rollout.importance_cap needs the sampler's log-probabilities: the rollouts have none (Rollout.logprobs)"
        )
    return rollouts


def checked_loss(returned: Any, rows: int, names: Iterable[str] | None) -> tuple[Tensor, Mapping[str, Tensor]]:
    """`returned` if it is what a `Divergence` has to return for so many rows; else an error that says what is wrong.

    `names`: of the statistics that it returned for an earlier micro-batch, if there was one.
    """
    told, accepted = "the loss function (loss) returned", "(loss, statistics), a 0-d tensor and a dict of (R,) tensors"
    if not isinstance(returned, tuple | list):
        raise TypeError(f"{told} {_said(returned)}; accepted: {accepted}")
    if len(returned) != 2:
        raise ValueError(f"{told} {len(returned)} values; accepted: {accepted}")
    loss, stats = returned
    if not isinstance(loss, Tensor):
        raise TypeError(f"{told} {_said(loss)} as the loss; accepted: {accepted}")
    if loss.ndim:
        raise ValueError(f"{told} a loss of shape {tuple(loss.shape)}; accepted: 0-d, as a sum over tokens is")
    if not loss.requires_grad:
        raise ValueError(f"{told} a loss without a gradient; accepted: one computed from student_hidden, not detached")
    if not isinstance(stats, Mapping):
        raise TypeError(f"{told} {_said(stats)} as the statistics; accepted: a dict of (R,) tensors, empty for none")
    for name, value in stats.items():
        if not isinstance(name, str) or name in OWN_NAMES:
            raise ValueError(f"{told} a statistic called {name!r}; accepted: text other than {', '.join(OWN_NAMES)}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{told} {_said(value)} as statistic {name!r}; accepted: an (R,) tensor, here ({rows},)")
        if value.shape != (rows,):
            raise ValueError(
                f"{told} statistic {name!r} of shape {tuple(value.shape)}; accepted: (R,), one value for each rollout "
                f"token, here ({rows},)"
            )
    if names is not None and set(names) != stats.keys():
        raise ValueError(
            f"{told} statistics called {', '.join(stats) or 'nothing'}, for another micro-batch "
            f"{', '.join(names) or 'nothing'}; accepted: the same names in every call"
        )
    return loss, stats


def _said(value: Any) -> str:
    """A wrong value for a message, short."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else type(value).__name__


def micro_batches(lengths: Sequence[int], size: int, together: int = 1) -> list[list[int]]:
    """Numbers of the rollouts to score together, at most `size`: similar lengths, the longest first, so that memory
    runs out at once if it ever does.

    Every `together` successive rollouts belong to one prompt. They stay in one micro-batch where `size` allows it.
    """
    prompts = [range(start, start + together) for start in range(0, len(lengths), together)]
    prompts.sort(key=lambda own: -sum(lengths[i] for i in own))
    order = [i for own in prompts for i in sorted(own, key=lambda i: -lengths[i])]
    if together <= size:
        size -= size % together
    return [order[start : start + size] for start in range(0, len(order), size)]


def score(
    run: Run, examples: Sequence[Example], rollouts: Sequence[Rollout], clock: Clock | None = None
) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the rollouts' tokens, (R, H) each: the student's, with a gradient, the teacher's.

    Args:
        examples: that of each rollout, so that one may come several times.
        clock: gets the phases "teacher" and "student", or "score" where both run in one pass.

    Packed, both contexts run without padding, a prompt is computed once for all its rollouts, and a gradient-
    checkpointed model takes both contexts in one pass.
    """
    clock = Clock(run.device) if clock is None else clock
    student, teacher = [example.student for example in examples], [example.teacher for example in examples]
    ids = [rollout.ids for rollout in rollouts]
    if run.packed:
        batch = pack_dual_context(student, teacher, ids)  # equal prompts are shared
        with autocast(run.config, run.device):
            joint = plan_passes(run.model, teacher=run.teacher.source).passes == "joint"
            with clock("score") if joint else teacher_then_student(clock, run.model):
                return dual_hidden_states(run.model, batch, teacher=run.teacher.source)
    # Each in an autocast of its own: what the teacher's casts without a gradient must not reach the student.
    with clock("teacher"), autocast(run.config, run.device):
        teacher_hidden = run.teacher.hidden(teacher, ids)
        check_hidden(run.teacher, teacher_hidden, sum(map(len, ids)))
    with clock("student"), autocast(run.config, run.device):
        return rollout_hidden(run.model, student, ids), teacher_hidden


@contextmanager
def teacher_then_student(clock: Clock, model: nn.Module) -> Iterator[None]:
    """The phase "teacher" up to the pass of `model` that has a gradient, the phase "student" from there on."""

    def begin(*_: object) -> None:
        if torch.is_grad_enabled():
            phase.close()
            phase.enter_context(clock("student"))

    with ExitStack() as phase:
        phase.enter_context(clock("teacher"))
        handle = body(model).register_forward_pre_hook(begin)
        try:
            yield
        finally:
            handle.remove()


def token_divergence(
    run: Run, student_hidden: Tensor, teacher_hidden: Tensor, rollouts: Sequence[Rollout], denominator: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the batch's loss that these rollouts contribute, and statistics of their tokens.

    Args:
        student_hidden: (R, H); receives the gradient.
        teacher_hidden: (R, H).
        rollouts: whose R token ids the rows predict.
        denominator: tokens of the whole batch for the reduction "mean", rollouts for "sequence_mean". Importance
            weights do not change it: a token counts one, whatever it weighs.

    Returns:
        The loss, 0-d, and for each name of a statistic an (R,) tensor.
    """
    o, options = run.config.objective, run.config.rollout
    ids = [rollout.ids for rollout in rollouts]
    targets, sequences = rollout_index(ids, student_hidden.device)
    sampler = _sampler_logprobs(rollouts, student_hidden.device)
    weights: Tensor | None = None
    weighing: dict[str, Tensor] = {}
    if options.importance_cap is not None:
        assert sampler is not None  # `checked` has seen to it
        weights, weighing = importance_weights(run, student_hidden, targets, sampler)
    form = _sampled_token if o.form == "sampled_token" else _full_vocabulary
    loss, stats = form(run, student_hidden, teacher_hidden, targets, sequences, weights, denominator)
    student_logprob = stats.pop("student_logprob")
    if weights is None and sampler is not None and o.temperature == options.temperature:
        weighing["sampler_mismatch"] = (student_logprob - sampler).abs()
    return loss, stats | weighing


def _full_vocabulary(
    run: Run,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    targets: Tensor,
    sequences: Tensor,
    weights: Tensor | None,
    denominator: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    o, student, teacher = run.config.objective, run.head, run.teacher.head
    other: dict[str, Any] = {}
    if teacher.weight is not student.weight:  # one shared tensor lets the kernels project both at once
        other = {
            "teacher_weight": teacher.weight,
            "teacher_bias": teacher.bias,
            "teacher_logit_scale": teacher.logit_scale,
            "teacher_softcap": math.inf if teacher.softcap is None else teacher.softcap,
        }
    loss, stats = jsd_loss(
        student_hidden,
        teacher_hidden,
        student.weight,
        **student.options(),
        **other,
        beta=o.beta,
        temperature=o.temperature,
        entry_clip=o.entry_clip,
        token_clip=o.token_clip,
        top_k=o.top_k,
        top_k_from=o.top_k_from,
        tail_bucket=o.tail_bucket,
        token_weight=weights,
        sequence_ids=sequences,
        target_ids=targets,
        reduction=o.reduction,
        denominator=denominator,
        return_stats=True,
        backend=o.backend,
        workspace_bytes=o.workspace_bytes,
    )
    names = ("divergence", "student_entropy", "teacher_entropy", "entry_clipped", "clipped_amount", "token_clipped")
    return loss, {name: getattr(stats, name) for name in (*names, "student_logprob")}


def _sampled_token(
    run: Run,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    targets: Tensor,
    sequences: Tensor,
    weights: Tensor | None,
    denominator: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A log p_S(y) with the advantage A = log p_T(y) - log p_S(y) held constant: policy gradient of the reverse KL."""
    o, student, teacher = run.config.objective, run.head, run.teacher.head
    options: dict[str, Any] = {"temperature": o.temperature, "return_entropy": True, **_kernel(o)}
    with torch.no_grad():
        teacher_logp, teacher_entropy = token_logprobs(
            teacher_hidden, teacher.weight, targets, **teacher.options(), **options
        )
    student_logp, student_entropy = token_logprobs(
        student_hidden, student.weight, targets, **student.options(), **options
    )
    advantage = teacher_logp - student_logp.detach()
    losses = -advantage * student_logp
    if weights is not None:
        losses = losses * weights
    if o.reduction == "sequence_mean":
        losses = losses / torch.bincount(sequences)[sequences]
    stats = {"divergence": -advantage, "student_entropy": student_entropy, "teacher_entropy": teacher_entropy}
    return losses.sum() / denominator, {**stats, "student_logprob": student_logp.detach()}


@torch.no_grad()
def importance_weights(
    run: Run, student_hidden: Tensor, targets: Tensor, sampler_logprobs: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """min(p_student / p_sampler, rollout.importance_cap) for each token, a constant, and statistics of it.

    p_student is over the whole vocabulary at rollout.temperature, by the weights and the arithmetic of the scoring
    pass. It costs one more product of the hidden states with the head, without a gradient.

    Args:
        student_hidden: (R, H).
        targets: (R,) int64, the sampled tokens.
        sampler_logprobs: (R,), of the distribution they were sampled from.

    Returns:
        (R,), and (R,) each: `sampler_mismatch`, |log p_student - log p_sampler|, in which the cut-offs of rollouts
        (top_p, top_k, min_p) take part, since p_sampler is what they leave; `importance_capped`, whether the cap acts;
        `importance_weight`.
    """
    head, options = run.head, run.config.rollout
    assert options.importance_cap is not None
    logprobs = token_logprobs(
        student_hidden,
        head.weight,
        targets,
        **head.options(),
        temperature=options.temperature,
        **_kernel(run.config.objective),
    )
    gap = logprobs - sampler_logprobs  # type: ignore[operator]
    ratio = gap.exp()
    weights = ratio.clamp(max=options.importance_cap)
    capped = ratio > options.importance_cap
    return weights, {"sampler_mismatch": gap.abs(), "importance_capped": capped, "importance_weight": weights}


def _sampler_logprobs(rollouts: Sequence[Rollout], device: torch.device) -> Tensor | None:
    """(R,) float32 of all rollouts in order, None if they were not recorded."""
    if any(rollout.logprobs is None for rollout in rollouts):
        return None
    return torch.tensor([value for rollout in rollouts for value in rollout.logprobs or ()], device=device)


@torch.no_grad()
def top_k_overlap(run: Run, student_hidden: Tensor, teacher_hidden: Tensor, k: int = 8, rows: int = 256) -> Tensor:
    """0-d: the share of the teacher's k likeliest tokens that are among the student's k likeliest, an estimate.

    Both tops cost a product with the head, so a step asks for them on at most `rows` tokens, spread evenly over those
    of its first micro-batch.
    """
    every = -(-len(student_hidden) // rows)
    student, teacher = run.head, run.teacher.head
    k = min(k, *(head.weight.shape[0] if head.valid_vocab is None else head.valid_vocab for head in (student, teacher)))
    (_, ours, _), (_, theirs, _) = (
        top_k_logprobs(hidden[::every], head.weight, k, **head.options())
        for hidden, head in ((student_hidden, student), (teacher_hidden, teacher))
    )
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean()


def _kernel(o: ObjectiveConfig) -> dict[str, Any]:
    return {"backend": o.backend, "workspace_bytes": o.workspace_bytes}


def supervised_loss(
    model: nn.Module, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], denominator: float
) -> Tensor:
    """Cross-entropy of `completions` after `prompts`, summed over their tokens and divided by `denominator`: the loss
    of supervised fine-tuning, for steps that are compared with `opsd_step`."""
    hidden = rollout_hidden(model, prompts, completions)
    targets, _ = rollout_index(completions, hidden.device)
    head = lm_head_of(model)
    logprobs = token_logprobs(hidden, head.weight, targets, **head.options())
    return -logprobs.sum() / denominator  # type: ignore[union-attr]
