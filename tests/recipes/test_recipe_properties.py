"""Recipes on any shapes, sequences, masks and borders of the kernels' chunks, against the dense transcriptions in
float64; and AntiSD over a batch and PPO's clips against dense code of their own."""

import math
from dataclasses import replace

import dense
import pytest
import torch
from _helpers import leaf
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_token_loss import CASES, close

from opsd.recipes import TokenBatch, make
from opsd_kernels import Stream

LEFT_OUT = {"pbsd"}  # its pairs need both kinds of rollout, see test_token_loss
PROPERTIES = [case for case in CASES if case[0] not in LEFT_OUT]

shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 6), min_size=1, max_size=5),
        "order": st.booleans(),  # whether the sequences' numbers rise
        "vocab": st.integers(21, 70),  # above what MSD takes the entropy of
        "padding": st.integers(0, 4),  # columns that are no tokens
        "hidden": st.integers(1, 9),
        "rows_in_a_chunk": st.one_of(st.none(), st.integers(1, 7)),
        "gap": st.sampled_from([1.0, 0.1, 1e-3]),
        "seed": st.integers(0, 2**20),
    }
)


def given_case(recipe, shape):
    """The student, the teachers, a batch of random fields, and weights of the tokens."""
    g = torch.Generator().manual_seed(shape["seed"])

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=g, dtype=torch.float64) * scale

    lengths = torch.tensor(shape["lengths"])
    n, v, h = int(lengths.sum()), shape["vocab"], shape["hidden"]
    numbers = torch.arange(len(lengths)) * 3
    sequences = (numbers if shape["order"] else numbers.flip(0)).repeat_interleave(lengths)

    def of_each(values):
        return values.repeat_interleave(lengths)

    def flags():
        return of_each(torch.rand(len(lengths), generator=g) < 0.5)

    weight, rows = normal(v + shape["padding"], h), normal(n, h)
    options = {"valid_vocab": v if shape["padding"] else None}
    student = Stream(leaf(rows), weight, **options)
    teachers = {}
    for name in recipe.contexts:
        hidden = rows + normal(n, h, scale=shape["gap"])
        teachers[name] = Stream(leaf(hidden) if name == "privileged_student" else hidden, weight, **options)
    batch = TokenBatch(
        target_ids=torch.randint(v, (n,), generator=g),
        sequence_ids=sequences,
        sampler_logprobs=-normal(n).abs() - 1,
        advantage=of_each(normal(len(lengths))),
        correct=flags(),
        has_feedback=flags(),
        old_logprobs=-normal(n).abs() - 1,
        teacher_logprobs=-normal(n).abs() - 1,
        confidence=torch.rand(n, 2, generator=g, dtype=torch.float64) * 100,
        chunk_score=normal(n),
        is_cross=flags(),
        decoded=torch.rand(n, generator=g) < 0.5,
        near=torch.rand(n, generator=g, dtype=torch.float64),
        layers=[(normal(n, 3), normal(n, 3), 1.0), (normal(n, 5), normal(n, 5), 0.5)],
        progress=0.4,
        step=7,
        discrepancy_std=0.8,
        warmup_perplexity=1.5,
    )
    return student, teachers, batch, normal(n)


def both(losses, formula, student, teachers, weights):
    """(losses, gradients) of the recipe and of its formula."""
    leaves = [stream.hidden for stream in (student, *teachers.values()) if stream.hidden.requires_grad]
    for found in (losses, formula):
        gradients = [torch.zeros_like(x) for x in leaves]
        if found.requires_grad:
            some = torch.autograd.grad((found * weights).sum(), leaves, allow_unused=True, retain_graph=True)
            gradients = [zero if own is None else own for own, zero in zip(some, gradients, strict=True)]
        yield found.detach(), gradients


def workspace(shape):
    """Bytes for a few rows with their temporaries, of which there are 20 beside the logits of every stream."""
    rows = shape["rows_in_a_chunk"]
    return None if rows is None else rows * 40 * (shape["vocab"] + shape["padding"]) * 8


@pytest.mark.parametrize(
    ("name", "options", "formula"), PROPERTIES, ids=[f"{name} {options}" for name, options, _ in PROPERTIES]
)
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.generate])
@given(shape=shapes)
def test_any_rows_and_chunks(name, options, formula, shape):
    recipe = make(name, **options, backend="torch", workspace_bytes=workspace(shape))
    if name == "anti_sd":  # whose formula has no norm of a single token
        shape = shape | {"lengths": [length + 1 for length in shape["lengths"]]}
    student, teachers, batch, weights = given_case(recipe, shape)
    s, t = dense.log_p(student), {key: dense.log_p(stream) for key, stream in teachers.items()}
    losses = recipe.token_loss(student, teachers, batch)[0]
    close(*both(losses, formula(s, t, batch), student, teachers, weights))


def median_perplexity(t, y, seq):
    """Of the batch's sequences; the lower of the two in the middle."""
    each = sorted(math.exp(-dense.at(t, y)[seq == one].mean()) for one in seq.unique())
    return each[(len(each) - 1) // 2]


@pytest.mark.parametrize("was_open", [True, False])
@pytest.mark.parametrize("where", [0.9, 1.0, 1.1])  # of the median of the warm-up: below, between and above the limits
@pytest.mark.parametrize("seed", [1, 2])
def test_anti_sd_over_a_batch(seed, where, was_open):
    """One strength for all, by the median perplexity, behind a gate that stays as it was between 0.93 and 1.07."""
    shape = {"lengths": [4, 2, 5, 3], "order": True, "vocab": 30, "padding": 0, "hidden": 6, "gap": 0.5, "seed": seed}
    recipe = make("anti_sd", scope="batch", highest_perplexity=1e6)
    student, teachers, batch, weights = given_case(recipe, shape)
    s, t = dense.log_p(student), dense.log_p(teachers["teacher"])
    y, seq = batch.target_ids, batch.sequence_ids
    perplexity = median_perplexity(t, y, seq)
    median = perplexity / where
    batch = replace(batch, warmup_perplexity=median, gate_open=was_open)
    gate = {0.9: False, 1.0: was_open, 1.1: True}[where]
    strength = min(max(0.2 * math.log(perplexity / (0.93 * median)), 0.0), 0.5) if gate else 0.0
    difference = (dense.at(t, y) - dense.at(s, y)).detach().clamp(-1.6, 1.6)
    shaped = -0.5 * torch.log((1 + difference.exp()) / 2)
    w = batch.advantage.clone()
    for one in seq.unique():
        own = shaped[seq == one]
        w[seq == one] += strength * ((own - own.mean()) / own.var(correction=0).sqrt()).clamp(-5, 5)
    losses, stats = recipe.token_loss(student, teachers, batch)
    assert stats["gate_open"].tolist() == [gate] * len(y)
    close(*both(losses, -w * dense.at(s, y), student, teachers, weights))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.2, None), (None, 0.1), (0.05, 0.05)])
@pytest.mark.parametrize("seed", [3, 4])
def test_the_clips_of_ppo(seed, low, high):
    """min(A·r, A·clip(r)), token by token: which tokens still pull, and by how much."""
    shape = {"lengths": [6, 5, 9], "order": False, "vocab": 25, "padding": 2, "hidden": 5, "gap": 0.5, "seed": seed}
    recipe = make("act_guide", ratio=True, clip_low=low, clip_high=high)
    student, teachers, batch, weights = given_case(recipe, shape)
    now = dense.at(dense.log_p(student), batch.target_ids)
    spread = torch.linspace(-0.5, 0.5, len(now), dtype=torch.float64)  # ratios from 0.6 to 1.6
    batch = replace(batch, sampler_logprobs=(now - spread).detach())
    wanted = []
    for advantage, logprob, old in zip(batch.advantage, now, batch.sampler_logprobs, strict=True):
        ratio = torch.exp(logprob - old)
        outside = (
            (advantage > 0 and high is not None and ratio > 1 + high)
            or (advantage < 0 and low is not None and ratio < 1 - low)
        )  # fmt: skip
        bound = 1 + (high or 0) if advantage > 0 else 1 - (low or 0)
        wanted.append(-advantage * (torch.as_tensor(bound, dtype=torch.float64) if outside else ratio))
    losses = recipe.token_loss(student, teachers, batch)[0]
    close(*both(losses, torch.stack(wanted), student, teachers, weights))
