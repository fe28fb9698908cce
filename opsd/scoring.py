"""From prompts and rollouts to the rows of hidden states that predict the rollouts, in both contexts."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from opsd.clock import Clock
from opsd.models import autocast, body
from opsd.recipes.base import columns
from opsd.recipes.batch import TopK
from opsd.run import MicroBatch, Run
from opsd_kernels import Head, Stream, dual_hidden_states, lm_head_of, pack_dual_context, token_logprobs, top_k_logprobs
from opsd_kernels.packing import context_hidden_states


def score(run: Run, batch: MicroBatch, clock: Clock | None = None) -> tuple[Stream, dict[str, Any]]:
    """The student's rows, with a gradient, and the constant rows of the contexts that the recipe reads, by name.

    Packed, all contexts run without padding, a prompt is computed once for all its rollouts, the constant contexts are
    one layout, and a gradient-checkpointed model takes them and the student's in one pass. `clock` gets the phases
    "teacher" and "student", or "score" where all run in one pass. A teacher that is no model here gives a `TopK`.
    """
    clock = clock or Clock(run.device)
    options, teacher, source = run.config.model, run.teacher, run.teacher.source
    prompts = [example.student for example in batch.examples]
    if source is None:
        return _beside_top_k(run, teacher, prompts, batch, clock)
    own = ("teacher", "privileged_student")  # what is reported needs the teacher
    names = ("teacher", *(name for name in run.recipe.contexts if name not in own))
    read = {name: [example.read_as(name) for example in batch.examples] for name in names}
    ids = [rollout.ids for rollout in batch.rollouts]
    if run.packed:
        packed = pack_dual_context(prompts, [*chain(*read.values())], ids, contexts=len(read))
        with autocast(options, run.device):
            passes, taught = "joint" if run.joint else "two", run.model if isinstance(source, str) else source
            with clock("score") if run.joint else teacher_then_student(clock, taught):
                hidden = dual_hidden_states(run.model, packed, teacher=source, passes=passes)
        constant = hidden.teacher.tensor_split(len(read))
        return stream_of(hidden.student, run.head), _by_name(read, constant, teacher.head) | _second(run, batch, clock)
    # Each in an autocast of its own: what the teacher's casts without a gradient must not reach the student.
    with clock("teacher"), autocast(options, run.device):
        readings = [teacher.hidden(own, ids) for own in read.values()]
    with clock("student"), autocast(options, run.device):
        student_hidden = rollout_hidden(run.model, prompts, ids)
    return stream_of(student_hidden, run.head), _by_name(read, readings, teacher.head) | _second(run, batch, clock)


def _second(run: Run, batch: MicroBatch, clock: Clock) -> dict[str, Stream]:
    """The student's rows, with a gradient, after the prompt "privileged_student", where the recipe reads that."""
    if "privileged_student" not in run.recipe.contexts:
        return {}
    prompts = [example.read_as("privileged_student") for example in batch.examples]
    with clock("student"):
        return {"privileged_student": stream_of(_student_hidden(run, prompts, batch), run.head)}


def _student_hidden(run: Run, prompts: Sequence[Sequence[int]], batch: MicroBatch) -> Tensor:
    ids = [rollout.ids for rollout in batch.rollouts]
    with autocast(run.config.model, run.device):
        if run.packed:
            return context_hidden_states(run.model, pack_dual_context(prompts, prompts, ids))
        return rollout_hidden(run.model, prompts, ids)


def _beside_top_k(
    run: Run, teacher: Any, prompts: Sequence[Sequence[int]], batch: MicroBatch, clock: Clock
) -> tuple[Stream, dict[str, Any]]:
    with clock("teacher"):
        known = teacher.top_k(batch.examples, batch.rollouts)
    with clock("student"):
        hidden = _student_hidden(run, prompts, batch)
    return stream_of(hidden, run.head), {"teacher": known}


def _by_name(names: Iterable[str], hidden: Sequence[Tensor], head: Head) -> dict[str, Stream]:
    return {name: stream_of(rows, head) for name, rows in zip(names, hidden, strict=True)}


@contextmanager
def teacher_then_student(clock: Clock, teacher: nn.Module) -> Iterator[None]:
    """The phase "teacher" until the body of `teacher` has run once, and the phase "student" from there on."""
    with ExitStack() as phase:
        phase.enter_context(clock("teacher"))

        def taught(*_: object) -> None:
            handle.remove()
            phase.close()
            phase.enter_context(clock("student"))

        handle = body(teacher).register_forward_hook(taught)
        try:
            yield
        finally:
            handle.remove()


def rollout_hidden(model: nn.Module, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]) -> Tensor:
    """(R, H) hidden states after the final norm, the inputs of the lm_head that predict the R rollout tokens.

    Args:
        prompts: B lists of token ids, none of them empty.
        rollouts: B lists of token ids, taken verbatim. R is the sum of their lengths; rows follow their order.

    The prompt's last token predicts the first rollout token, so the last rollout token is not fed at all.
    """
    device = next(model.parameters()).device
    sequences = [[*prompt, *rollout[:-1]] for prompt, rollout in zip(prompts, rollouts, strict=True)]
    width = max(map(len, sequences))
    # Padding is on the right of causal attention: no real token sees it, so its id is arbitrary, positions need no
    # correction, and without a mask the fastest attention kernel stays available.
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    rows = [
        start + position
        for start, prompt, rollout in zip(range(0, len(sequences) * width, width), prompts, rollouts, strict=True)
        for position in range(len(prompt) - 1, len(prompt) - 1 + len(rollout))
    ]
    hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, torch.tensor(rows, device=device))


def rollout_index(rollouts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """`target_ids` and `sequence_ids`, both (R,) int64: the tokens that the rows of `rollout_hidden` predict, and the
    number of the rollout that each belongs to."""
    targets = torch.tensor([token for rollout in rollouts for token in rollout], dtype=torch.int64, device=device)
    lengths = torch.tensor([len(rollout) for rollout in rollouts], device=device)
    total = sum(map(len, rollouts))  # known on the host, so that nothing waits for the device
    return targets, torch.repeat_interleave(torch.arange(len(rollouts), device=device), lengths, output_size=total)


def stream_of(hidden: Tensor, head: Head) -> Stream:
    """(N, H) rows and the head that reads them, at temperature 1."""
    return Stream(hidden, head.weight, **head.options())


@torch.no_grad()
def top_k_overlap(student: Stream, teacher: Stream | TopK, k: int = 8, rows: int = 256) -> Tensor:
    """0-d: the share of the teacher's k likeliest tokens that are among the student's k likeliest, an estimate.

    Both tops cost a product with the head, so they are taken on at most `rows` tokens, spread evenly.
    """
    every = -(-len(student.hidden) // rows)
    if isinstance(teacher, TopK):
        valid = columns(student)
        k = min(k, teacher.ids.shape[1])
    else:
        valid = min(columns(student), columns(teacher))
        k = min(k, valid)
    ours, theirs = (
        stream.ids[::every, :k]
        if isinstance(stream, TopK)
        else top_k_logprobs(stream.hidden[::every], stream.weight, k, **stream.options() | {"valid_vocab": valid})[1]
        for stream in (student, teacher)
    )
    return (theirs[:, :, None] == ours[:, None, :]).any(-1).double().mean()


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
