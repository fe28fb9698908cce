"""The Triton attention under Triton's interpreter, against the eager backend in float64; its tables by brute force.

The interpreter has to be chosen before Triton is first imported, and other tests need the compiler: without
TRITON_INTERPRET=1 this file therefore runs its kernels in a fresh process that has it.
"""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opsd_kernels.packing import attention, dual_hidden_states, pack_dual_context, plan_passes, triton_attention
from opsd_kernels.packing.layout import Layout
from opsd_kernels.packing.triton_attention import Work
from opsd_kernels.triton_jit import INTERPRETED

pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl

inner = pytest.mark.skipif(not INTERPRETED, reason="runs in the process with TRITON_INTERPRET=1")
# numpy warns of infinities that the kernels select away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GROUPS = ("exact", "not exact")


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(group: str) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", group, str(Path(__file__))]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


# The tables, on the host.

TOKENS = st.integers(0, 2)  # few, so that prompts share beginnings
PROMPT = st.lists(TOKENS, min_size=1, max_size=9)
EXAMPLE = st.tuples(PROMPT, PROMPT, st.lists(st.lists(TOKENS, max_size=9), max_size=4))


def visible(layout: Layout, window: int | None) -> Tensor:
    """(T, T) bool by definition: query row, key row."""
    seen = torch.zeros(layout.rows, layout.rows, dtype=torch.bool)
    for s in layout.segments:
        before = [r for start, stop in s.prefix for r in range(start, stop)]
        for row in range(s.start, s.stop):
            context = [*before, *range(s.start, row + 1)]
            seen[row, context[-window:] if window else context] = True
    return seen


def pairs(work: list[Work], step: int, window: int | None, keys_first: bool) -> Tensor:
    """Pairs (tile row, run row) by the tables' rules: how often each is met."""
    rows = max(w.stop for w in work)
    met = torch.zeros(rows, rows, dtype=torch.int64)
    for tile in work:
        for run in tile.runs:
            assert run.start <= run.masked <= run.stop
            assert run.start < run.stop
            assert (run.masked - run.start) % step == 0
            for row in range(tile.start, tile.stop):
                for other in range(run.start, run.stop):
                    distance = (other - row if keys_first else row - other) + run.shift
                    hidden = distance < 0 or (window is not None and distance >= window)
                    met[row, other] += other < run.masked or not hidden
    return met


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
@settings(max_examples=150, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=3), st.integers(1, 5), st.integers(1, 5), st.none() | st.integers(1, 12))
def test_tables_meet_exactly_what_is_visible(examples: Any, queries: int, keys: int, window: int | None) -> None:
    students, teachers, rollouts = (list(column) for column in zip(*examples, strict=True))
    layout = pack_dual_context(students, teachers, rollouts).joint(share_contexts=True).layout
    if not layout.rows:
        return
    want = visible(layout, window).long()
    by_query = triton_attention.query_tiles(layout, queries, keys, window)
    by_key = triton_attention.key_tiles(layout, queries, keys, window)
    for work, size in ((by_query, queries), (by_key, keys)):
        assert sorted(r for w in work for r in range(w.start, w.stop)) == list(range(layout.rows))
        for w in work:
            assert 0 < w.stop - w.start <= size
            assert any(s.start <= w.start and w.stop <= s.stop for s in layout.segments)
    assert torch.equal(pairs(by_query, keys, window, keys_first=False), want)
    assert torch.equal(pairs(by_key, queries, window, keys_first=True).T, want)


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_rollouts_are_one_run_of_their_prompt() -> None:
    layout = pack_dual_context([[1] * 40], [[2]], [[[3] * 31, [4] * 11, [5] * 2]]).student.layout
    first, second, *_ = triton_attention.key_tiles(layout, 16, 32, None)
    # the diagonal, then all rows behind it without a mask but for the last tile's
    assert first.runs == ((0, 0, 32, 0), (32, 80, 81, 0))
    assert second.runs == ((32, 32, 48, 0), (48, 80, 81, 0))


# The kernels, in the interpreter.


@dataclass(frozen=True)
class Case:
    """A layout by the lengths of its prompts and rollouts, and heads."""

    students: tuple[int, ...]
    rollouts: tuple[tuple[int, ...], ...]
    teachers: tuple[int, ...] = ()  #: what they add to the student's prompt; if there are any, the layout is joint
    heads: tuple[int, int] = (2, 1)
    size: int = 64
    softcap: float | None = None
    window: int | None = None

    @functools.cached_property
    def layout(self) -> Layout:
        draw = torch.Generator().manual_seed(0)

        def tokens(n: int) -> list[int]:
            return torch.randint(3, 97, (n,), generator=draw).tolist()

        students = [tokens(n) for n in self.students]
        rollouts = [[tokens(n) for n in own] for own in self.rollouts]
        added = self.teachers or (1,) * len(students)
        batch = pack_dual_context(
            students, [[*s[:-2], *tokens(n)] for s, n in zip(students, added, strict=True)], rollouts
        )
        return batch.joint(share_contexts=True).layout if self.teachers else batch.student.layout

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """query, key, value and the output's gradient, (1, heads, T, D), with peaked scores."""
        draw = torch.Generator().manual_seed(1)
        heads, kv_heads = self.heads
        shapes = [(1, self.layout.rows, n, self.size) for n in (heads, kv_heads, kv_heads, heads)]
        q, k, v, g = (torch.randn(*s, generator=draw, dtype=torch.float64).transpose(1, 2) for s in shapes)
        return tuple(t.to(dtype) for t in (2 * q, k, v, g))

    def run(self, attend: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Output, dQ, dK, dV."""
        *inputs, grad = (t.detach().requires_grad_(i < 3) for i, t in enumerate(tensors))
        out = attend(*inputs, self.layout, self.size**-0.5, self.window, self.softcap)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad))


CASES = {
    "one rollout each": Case((37, 5), ((20,), (1,))),
    "four rollouts, GQA": Case((41, 3), ((17, 2, 34, 1), (9,)), heads=(4, 2), size=32),
    "joint": Case((35, 9), ((6,), (18, 2)), teachers=(21, 4), size=32),
    "joint, window": Case((35, 9), ((6,), (18, 2)), teachers=(21, 4), size=16, window=19),
    "one-token segments, MQA": Case((1, 2), ((2, 2, 2), (1, 2)), heads=(4, 1), size=16),
    "long prefix": Case((99,), ((3, 6),), size=16),
    "softcap": Case((33,), ((20, 7),), size=32, softcap=2.5),
    "softcap, window in the prefix": Case((50,), ((20, 7),), size=16, softcap=4.0, window=37),
    "window across the boundary": Case((20,), ((40, 18),), size=16, window=9),
    "window of two": Case((18,), ((3, 17),), size=16, window=2),
    "head 96": Case((17,), ((20, 3),), size=96),
    "head 128": Case((33,), ((2, 19),), size=128),
    "head 8": Case((33,), ((2, 19),), heads=(2, 2), size=8),
}
NAMES = ("out", "dq", "dk", "dv")


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> dict[str, float]:
    return {n: float((a.double() - b).norm() / b.norm()) for n, a, b in zip(NAMES, got, want, strict=True)}


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    for name in ("_new_rows", "_new_sums"):
        new = getattr(triton_attention, name)
        monkeypatch.setattr(triton_attention, name, lambda like, new=new: new(like).fill_(math.nan))


@inner
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str) -> None:
    case = CASES[name]
    want = case.run(attention._eager, case.tensors())
    got = case.run(attention._triton, case.tensors(torch.float32))
    assert max(errors(got, want).values()) < 1e-6, errors(got, want)


@pytest.fixture
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bfloat16 as integers: here it rounds them as a device does, and multiplies their values."""
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        return torch.from_numpy(data.astype("float32")).bfloat16().view(torch.uint16).numpy()

    def multiplied(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(builder, *(builder.cast_impl(t, tl.float32) if t.dtype == tl.bfloat16 else t for t in (a, b)), *rest)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", multiplied)


@inner
@pytest.mark.usefixtures("_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["four rollouts, GQA", "softcap, window in the prefix"])
def test_rounding_is_that_of_torch(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    rounded = case.tensors(dtype)
    want = case.run(attention._eager, tuple(t.double() for t in rounded))
    torchs = errors(case.run(attention._eager, rounded), want)
    ours = errors(case.run(attention._triton, rounded), want)
    assert all(ours[n] <= 2 * torchs[n] for n in NAMES), (ours, torchs)


@inner
@pytest.mark.parametrize("table", ["query_tiles", "key_tiles"])
def test_a_wrong_table_is_seen(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix taken one row too late, in one table only, shows in just the results that are made from it."""
    case = Case((20,), ((7, 18),), heads=(1, 1), size=16)
    right, keys_of = getattr(triton_attention, table), triton_attention._keys_of

    def late(segment: Any) -> Any:
        for link in keys_of(segment):
            own = link.start == segment.start
            yield link if own else link._replace(start=link.start + 1, stop=link.stop + 1)

    @functools.wraps(right)
    def wrong(*args: Any) -> list[Work]:
        with monkeypatch.context() as patch:
            patch.setattr(triton_attention, "_keys_of", late)
            return right(*args)

    monkeypatch.setattr(triton_attention, table, wrong)
    want = case.run(attention._eager, case.tensors())
    found = errors(case.run(attention._triton, case.tensors(torch.float32)), want)
    assert {n for n, e in found.items() if e > 1e-2} == ({"dk", "dv"} if table == "key_tiles" else set(NAMES))


@inner
def test_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdict(capped: bool = True) -> str | None:
        attention.self_check.cache_clear()
        with torch.no_grad():
            return attention.self_check("triton", torch.device("cpu"), torch.float32, 16, capped=capped, exact=True)

    assert verdict() is None
    right = triton_attention.Table.of
    monkeypatch.setattr(triton_attention.Table, "of", lambda work, device: right(work[:-1], device))
    assert "is off by nan" in str(verdict())  # rows without a tile stay as they were
    monkeypatch.setattr(triton_attention, "attend", None)
    assert "fails on cpu (TypeError" in str(verdict())
    attention.self_check.cache_clear()


@inner
def test_strides_and_what_is_not_seen() -> None:
    """Any strides give the same bits; NaN in one prompt and its rollouts reaches no other."""
    case = Case((19, 8), ((5, 18), (4, 9)), size=16)
    tensors = case.tensors(torch.float32)
    want = case.run(attention._triton, tensors)
    heads_first = tuple(t.contiguous() for t in tensors)
    rows_last = tuple(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors)
    for other in (heads_first, rows_last):
        for a, b in zip(case.run(attention._triton, other), want, strict=True):
            assert torch.equal(a, b)
    start = case.layout.segments[3].start
    assert case.layout.segments[3].prefix == ()
    for bad, good in ((slice(0, start), slice(start, None)), (slice(start, None), slice(0, start))):
        spoilt = tuple(t.clone() for t in tensors)
        for t in spoilt:
            t[:, :, bad] = math.nan
        for a, b in zip(case.run(attention._triton, spoilt), want, strict=True):
            assert torch.equal(a[:, :, good], b[:, :, good])
            assert a[:, :, bad].isnan().any()


@inner
def test_exact_whatever_heads_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of programs changes no bit."""
    case = Case((20, 3), ((7, 18), (5,)), heads=(8, 4), size=16)
    found = []
    for together in (1, 2, 4):
        monkeypatch.setattr(triton_attention, "_together", lambda *_, n=together: n)
        found.append(case.run(attention._triton, case.tensors(torch.float32)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.skipif(INTERPRETED, reason="needs no interpreter")
def test_heads_that_take_turns_fit_the_cache() -> None:
    assert [triton_attention._together(8, size, 100) for size in (1, 12, 13, 25, 26, 50, 51, 1000)] == [
        8, 8, 4, 4, 2, 2, 1, 1,
    ]  # fmt: skip
    assert triton_attention._together(6, 30, 100) == 3
    assert triton_attention._together(7, 30, 100) == 1


@inner
def test_exact_with_frozen_keys_and_values() -> None:
    case = Case((20,), ((7, 18),), size=16)
    q, k, v, grad = case.tensors(torch.float32)
    *_, dq, _, _ = case.run(attention._triton, (q, k, v, grad))
    q.requires_grad_()
    (alone,) = torch.autograd.grad(attention._triton(q, k, v, case.layout, 0.25, None, None), q, grad)
    assert torch.equal(alone, dq)


@inner
def test_exact_under_a_gradient_of_one_number() -> None:
    """`sum` hands down a gradient without strides."""
    case = Case((20,), ((7, 18),), size=16)
    *inputs, grad = case.tensors(torch.float32)
    want = case.run(attention._triton, (*inputs, torch.ones_like(grad)))[1:]
    inputs = [t.requires_grad_() for t in inputs]
    got = torch.autograd.grad(attention._triton(*inputs, case.layout, 0.25, None, None).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@inner
@pytest.mark.parametrize("passes", ["two", "joint"])
def test_through_a_model(passes: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).train()
    batch = pack_dual_context([[5, 6, 7, 8]], [[5, 6, 9, 10, 11]], [[[12, 13, 14], [15, 16]]])
    found = []
    for backend in ("eager", "triton"):
        model.zero_grad()
        hidden = dual_hidden_states(model, batch, passes=passes, backend=backend)
        (hidden.student * hidden.teacher).sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append([hidden.student.detach(), hidden.teacher, *gradients])
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert plan_passes(model).backend == "sdpa"  # on the CPU never by itself


@inner
def test_refusals() -> None:
    case = Case((4,), ((3,),), size=16)
    q, k, v, _ = case.tensors(torch.float32)

    def attend(*tensors: Tensor, scale: float = 1.0, softcap: float | None = None) -> None:
        attention._triton(*tensors, case.layout, scale, None, softcap)

    with pytest.raises(
        ValueError, match=r"takes float16, bfloat16 or float32, not torch.float64; accepted here: eager"
    ):
        attend(q.double(), k.double(), v.double())
    with pytest.raises(TypeError, match=r"needs query, key and value of one dtype, got torch.float32, torch.bfloat16"):
        attend(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="needs keys and values of one shape"):
        attend(q, k, v[..., :8])
    rows = case.layout.rows
    with pytest.raises(
        ValueError, match=rf"needs \(1, heads, {rows}, D\) for this layout, got query \(1, 2, {rows - 1}"
    ):
        attend(*(t[:, :, 1:] for t in (q, k, v)))
    with pytest.raises(ValueError, match=r"for this layout, got query \(2, 2"):
        attend(*(torch.cat([t, t]) for t in (q, k, v)))
    with pytest.raises(ValueError, match=r"needs a positive scale and softcap, got -1\.0 and None"):
        attend(q, k, v, scale=-1.0)
    big = torch.zeros(1, 1, case.layout.rows, 256)
    with pytest.raises(ValueError, match=r"takes heads of up to 128 in torch.float32, not 256"):
        attend(big, big, big)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_refuses_a_cpu_by_name() -> None:
    case = Case((4,), ((3,),), size=16)
    with pytest.raises(
        ValueError, match="backend 'triton' cannot run: the device is cpu, not cuda; accepted here: eager"
    ):
        attention._triton(*case.tensors(torch.float32)[:3], case.layout, 1.0, None, None)
