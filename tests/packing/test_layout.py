"""The layout against its definition: what a row's context is, followed row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opsd_kernels.packing import fill_token_budget, pack_dual_context
from opsd_kernels.packing.layout import Layout, Segment

TOKENS = st.integers(0, 2)  # few, so that prompts share beginnings
PROMPT = st.lists(TOKENS, min_size=1, max_size=6)
EXAMPLE = st.tuples(PROMPT, PROMPT, st.lists(st.lists(TOKENS, max_size=5), max_size=4))


def contexts(layout: Layout) -> list[tuple[list[int], list[int]]]:
    """For each row the ids and the positions of all that it sees, in logical order, itself last."""
    found = []
    for s in layout.segments:
        before = [r for start, stop in s.prefix for r in range(start, stop)]
        for row in range(s.start, s.stop):
            seen = torch.tensor([*before, *range(s.start, row + 1)])
            found.append((layout.ids[seen].tolist(), layout.positions[seen].tolist()))
    return found


def check(layout: Layout, rows: torch.Tensor, prompts: list, rollouts: list) -> None:
    assert [s.start for s in layout.segments] == [0, *(s.stop for s in layout.segments)][: len(layout.segments)]
    assert layout.rows == len(layout.ids) == len(layout.positions)
    seen, r = contexts(layout), 0
    for prompt, own in zip(prompts, rollouts, strict=True):
        for rollout in own:
            for t in range(len(rollout)):
                ids, positions = seen[rows[r]]
                assert ids == [*prompt, *rollout[:t]]
                assert positions == list(range(len(ids)))
                r += 1
    assert r == len(rows)


@settings(max_examples=300, deadline=None)
@given(st.lists(EXAMPLE, max_size=4), st.booleans())
def test_every_row_sees_its_context_and_nothing_else(examples, share):
    students, teachers, rollouts = (
        (list(column) for column in zip(*examples, strict=True)) if examples else ([], [], [])
    )
    batch = pack_dual_context(students, teachers, rollouts, share_prefix=share)
    flat = [r for own in rollouts for r in (own or [[]])]
    assert batch.target_ids.tolist() == [t for r in flat for t in r]
    assert batch.sequence_ids.tolist() == [i for i, r in enumerate(flat) for _ in r]
    check(batch.student.layout, batch.student.rows, students, rollouts)
    check(batch.teacher.layout, batch.teacher.rows, teachers, rollouts)
    for contexts_too in (False, True):
        joint = batch.joint(share_contexts=contexts_too)
        check(joint.layout, joint.student_rows, students, rollouts)
        check(joint.layout, joint.teacher_rows, teachers, rollouts)
        n = joint.student.rows
        assert (
            joint.layout.segments[: len(joint.student.segments)]
            == joint.student.segments
            == batch.student.layout.segments
        )
        # No student row sees a teacher row, and what predicts the first token belongs to one context alone.
        assert all(stop <= n for s in joint.student.segments for _, stop in s.prefix)
        assert (joint.student_rows < n).all()
        assert (joint.teacher_rows >= n).all()
        if not (share and contexts_too):
            assert joint.layout.rows == n + batch.teacher.layout.rows


@settings(max_examples=100, deadline=None)
@given(st.lists(EXAMPLE, min_size=1, max_size=3), st.integers(1, 4), st.none() | st.integers(1, 7))
def test_tiles_cover_each_query_once_with_exactly_the_keys_it_needs(examples, size, window):
    students, teachers, rollouts = (list(column) for column in zip(*examples, strict=True))
    layout = pack_dual_context(students, teachers, rollouts).joint(share_contexts=True).layout
    covered = []
    for tile in layout.tiles(size, window):
        s = layout.segments[tile.segment]
        assert s.start <= tile.start < tile.stop <= s.stop
        assert tile.stop - tile.start <= size
        covered += range(tile.start, tile.stop)
        everything = [r for start, stop in (*s.prefix, (s.start, tile.stop)) for r in range(start, stop)]
        keys = [r for start, stop in (*tile.prefix, tile.own) for r in range(start, stop)]
        first = 0 if window is None else max(0, tile.position - window + 1)
        assert keys == everything[first:]
        assert (tile.position, tile.key_position) == (layout.positions[tile.start], first)
    assert covered == list(range(layout.rows))


def test_rows_are_shared_where_they_can_be():
    prompt, longer = [1, 2, 3, 4], [1, 2, 3, 5, 6]
    batch = pack_dual_context([prompt], [longer], [[[7, 8], [9, 7, 7], [8]]])
    assert batch.student.layout.segments == (Segment(0, 4), Segment(4, 5, ((0, 4),)), Segment(5, 7, ((0, 4),)))
    assert batch.student.rows.tolist() == [3, 4, 3, 5, 6, 3]
    joint = batch.joint(share_contexts=True)
    assert joint.layout.segments[3:] == (
        Segment(7, 9, ((0, 3),)),
        Segment(9, 10, ((0, 3), (7, 9))),
        Segment(10, 12, ((0, 3), (7, 9))),
    )
    assert pack_dual_context([prompt], [longer], [[7, 8]]).student.layout.segments == (Segment(0, 5),)
    alone = pack_dual_context([prompt], [longer], [[[7, 8], [9, 7]]], share_prefix=False)
    assert alone.student.layout.segments == (Segment(0, 5), Segment(5, 10))
    assert alone.joint(share_contexts=True).layout.rows == 10 + 12


def test_equal_prompts_count_as_one():
    batch = pack_dual_context([[1, 2], [1, 2]], [[3, 4], [4, 4]], [[5, 6], [7, 8]])
    assert batch.student.layout.rows == 2 + 1 + 1
    assert batch.teacher.layout.rows == 2 * 3


def test_each_context_keeps_its_last_prompt_token():
    batch = pack_dual_context([[1, 2, 3]], [[1, 2, 3]], [[4, 5]])
    joint = batch.joint(share_contexts=True)
    assert joint.layout.segments == (Segment(0, 4), Segment(4, 6, ((0, 2),)))


def test_moving_keeps_everything():
    batch = pack_dual_context([[1, 2]], [[3]], [[[4, 5], [6]]])
    moved = batch.to("cpu")
    assert moved.target_ids.tolist() == batch.target_ids.tolist() == [4, 5, 6]
    assert moved.student.layout.segments == batch.student.layout.segments
    assert batch.largest_id == 6


def test_budget():
    students = [[1] * n for n in (5, 50, 10, 3, 200)]
    teachers = [[1] * n for n in (9, 70, 10, 3, 300)]
    rollouts = [[[2] * 4, [2] * 6], [2] * 20, [[]], [2] * 3, [2] * 10]
    chosen = fill_token_budget(students, teachers, rollouts, tokens=200)
    assert sorted(i for one in chosen for i in one) == list(range(5))
    assert chosen[0] == [4]  # too long for any, so alone
    for one in chosen[1:]:
        part = pack_dual_context(*([column[i] for i in one] for column in (students, teachers, rollouts)))
        assert part.student.layout.rows + part.teacher.layout.rows <= 200
    rows = pack_dual_context(students[:1], teachers[:1], rollouts[:1])
    exact = rows.student.layout.rows + rows.teacher.layout.rows
    assert len(fill_token_budget(students[:1] * 2, teachers[:1] * 2, rollouts[:1] * 2, tokens=2 * exact)) == 1
    assert len(fill_token_budget(students[:1] * 2, teachers[:1] * 2, rollouts[:1] * 2, tokens=2 * exact - 1)) == 2
    with pytest.raises(ValueError, match="tokens must be a positive int, got 0"):
        fill_token_budget(students, teachers, rollouts, tokens=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[]], [[1]], [[1]]), ValueError, r"student_prompts\[0\] must have at least one token id"),
        (([[1]], [[1], []], [[1]]), ValueError, r"teacher_prompts\[1\] must have at least one token id"),
        (
            ([[1]], [[1], [2]], [[1]]),
            ValueError,
            "teacher_prompts must have one entry for each of 1 student_prompts, got 2",
        ),
        (([[1]], [[1]], []), ValueError, "rollouts must have one entry for each of 1 student_prompts, got 0"),
        ((["ab"], [[1]], [[1]]), TypeError, r"student_prompts\[0\] must be a list of token ids, got str"),
        (([[1, 2.0]], [[1]], [[1]]), TypeError, r"student_prompts\[0\]\[1\] must be a token id \(an int\), got 2.0"),
        (([[True]], [[1]], [[1]]), TypeError, r"student_prompts\[0\]\[0\] must be a token id \(an int\), got True"),
        (([[1]], [[1]], [[[1], [-4]]]), ValueError, r"rollouts\[0\]\[1\]\[0\] must be a token id .*, got -4"),
        (
            ([[1, 2**70]], [[1]], [[1]]),
            ValueError,
            rf"student_prompts\[0\]\[1\] must be a token id \(an int from 0 to {2**63 - 1}\), got {2**70}$",
        ),
        (([[1]], [[1]], [[[1], [4, 2**63]]]), ValueError, rf"rollouts\[0\]\[1\]\[1\] must be .*, got {2**63}$"),
        (([[1]], [[1]], [[[1], 4]]), TypeError, r"rollouts\[0\]\[1\] must be a list of token ids, got int"),
        (
            (torch.ones(1, 1), [[1]], [[1]]),
            TypeError,
            "student_prompts must be a list of lists of token ids, got Tensor",
        ),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pack_dual_context(*arguments)


def test_bad_switch():
    with pytest.raises(TypeError, match="share_prefix must be True or False, got 1"):
        pack_dual_context([[1]], [[1]], [[1]], share_prefix=1)


def test_several_contexts_need_as_many_prompts():
    with pytest.raises(ValueError, match="teacher_prompts must have 2 entries for each of 1 student_prompts, got 3"):
        pack_dual_context([[1]], [[1], [2], [3]], [[1]], contexts=2)
    with pytest.raises(ValueError, match="contexts must be a positive int, got 0"):
        pack_dual_context([[1]], [[1]], [[1]], contexts=0)
    assert pack_dual_context([[1]], [[1], [900]], [[1, 2]], contexts=2).largest_id == 900
