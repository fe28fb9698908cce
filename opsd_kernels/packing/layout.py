"""Two contexts as rows of one packed batch: who is where, who sees whom, which row predicts which token.

A context is [prompt | rollout]. Its rows are laid out without padding, the student's first. A `Segment` is a run of
rows that attends causally to itself and fully to the rows of its prefix, wherever these lie; its logical positions go
on from the prefix. So a prompt that several rollouts share is computed once, and so is the beginning that the prompts
of student and teacher have in common, if both run on the same weights. Sharing is decided on token ids, never on text.

    one rollout each                      two rollouts of one prompt            joint, same weights
    [student prompt|rollout]              [student prompt] <- [rollout 1]       [student prompt|rollout]
    [teacher prompt|rollout]                               <- [rollout 2]        └ common <- [rest of teacher's|rollout]

The last token of a rollout predicts nothing that is asked for, so it is not fed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, groupby
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

Range = tuple[int, int]
"""Rows [start, stop)."""

_LARGEST = 2**63 - 1  # of int64


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop), causal among themselves, after all rows of `prefix` (in logical order)."""

    start: int
    stop: int
    prefix: tuple[Range, ...] = ()

    @property
    def position(self) -> int:
        """The logical position of the first row."""
        return sum(stop - start for start, stop in self.prefix)

    def rows_at(self, first: int, last: int) -> tuple[Range, ...]:
        """The rows that hold the logical positions [first, last) of this segment's context."""
        found, position = [], 0
        for start, stop in (*self.prefix, (self.start, self.stop)):
            low, high = max(first - position, 0), min(last - position, stop - start)
            if low < high:
                found.append((start + low, start + high))
            position += stop - start
        return tuple(found)


@dataclass(frozen=True)
class Tile:
    """Query rows [start, stop) of one segment, from logical position `position` on, and the rows of the keys that they
    may see, which are the logical positions from `key_position` to that of the tile's last query. Causality, and a
    window if there is one, are still to be masked; `prefix` needs neither mask unless there is a window."""

    segment: int
    start: int
    stop: int
    position: int
    key_position: int
    prefix: tuple[Range, ...]
    own: Range


@dataclass(frozen=True)
class Layout:
    """Packed rows that go through a model at once. Segments are in the order of their rows and cover each row once."""

    ids: Tensor  #: (T,) int64
    positions: Tensor  #: (T,) int64, logical: they start at 0 in each context
    segments: tuple[Segment, ...]
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def rows(self) -> int:
        """T."""
        return self.segments[-1].stop if self.segments else 0

    @cached_property
    def longest(self) -> int:
        """The length of the longest context, shared rows included."""
        return max((s.position + s.stop - s.start for s in self.segments), default=0)

    def to(self, device: torch.device | str) -> Layout:
        """The same with its tensors on `device`."""
        if self.ids.device == torch.device(device):
            return self
        return Layout(self.ids.to(device), self.positions.to(device), self.segments)

    def tiles(self, rows: int, window: int | None = None) -> tuple[Tile, ...]:
        """Queries in tiles of at most `rows`, none of which straddles segments, each with the ranges of its keys.

        Args:
            rows: at least 1.
            window: a query sees this many logical positions, its own included; None: all before it.
        """
        key = ("tiles", rows, window)
        if key not in self._cache:
            self._cache[key] = tuple(
                chain.from_iterable(self._tiles_of(i, rows, window) for i in range(len(self.segments)))
            )
        return self._cache[key]

    def _tiles_of(self, index: int, rows: int, window: int | None) -> Iterable[Tile]:
        segment = self.segments[index]
        for start in range(segment.start, segment.stop, rows):
            stop = min(start + rows, segment.stop)
            position = segment.position + start - segment.start
            first = 0 if window is None else max(0, position - window + 1)
            own = (segment.start + max(0, first - segment.position), stop)
            yield Tile(index, start, stop, position, first, segment.rows_at(first, segment.position), own)

    def siblings(self) -> tuple[tuple[Segment, ...], ...]:
        """Runs of neighbouring segments with one and the same prefix: rollouts of one prompt, say."""
        return tuple(tuple(run) for _, run in groupby(self.segments, key=lambda s: s.prefix))


@dataclass(frozen=True)
class Context:
    """One side of a batch by itself."""

    layout: Layout
    rows: Tensor  #: (R,) int64: the row of `layout` whose hidden state predicts target r
    used: Tensor  #: the same rows, each once: rollouts of a shared prompt begin at one row

    def to(self, device: torch.device | str) -> Context:
        """The same with its tensors on `device`."""
        return Context(self.layout.to(device), self.rows.to(device), self.used.to(device))


@dataclass(frozen=True)
class Joint:
    """Both sides in one layout, the student's rows first and just as in the student's own layout."""

    layout: Layout
    student: Layout  #: the first rows of `layout`; none of them sees a later one
    student_rows: Tensor  #: (R,) int64
    teacher_rows: Tensor  #: (K·R,) int64, numbered within `layout`


@dataclass(frozen=True)
class DualContextBatch:
    """What `pack_dual_context` returns. R is the count of all rollout tokens, in the order of the rollouts."""

    target_ids: Tensor  #: (R,) int64
    sequence_ids: Tensor  #: (R,) int64: the number of the rollout that the token belongs to, empty ones counted
    student: Context
    teacher: Context
    share_prefix: bool
    contexts: int  #: K: the teacher's side holds K·R rows, all of the first context first
    _prompts: tuple[list[list[int]], list[list[int]]] = field(repr=False)
    _rollouts: list[list[list[int]]] = field(repr=False)
    _joint: dict[bool, Joint] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def largest_id(self) -> int:
        """The largest token id that is fed, -1 if there is none; known on the host."""
        sides = zip(self._prompts, (self._rollouts, self._rollouts * self.contexts), strict=True)
        fed = (t for prompts, written in sides for p, r in zip(prompts, written, strict=True) if any(r) for t in p)
        return max(chain(fed, (t for r in self._rollouts for one in r for t in one)), default=-1)

    def to(self, device: torch.device | str) -> DualContextBatch:
        """The same with its tensors on `device`."""
        if self.target_ids.device == torch.device(device):
            return self
        return replace(
            self,
            target_ids=self.target_ids.to(device),
            sequence_ids=self.sequence_ids.to(device),
            student=self.student.to(device),
            teacher=self.teacher.to(device),
            _joint={},
        )

    def joint(self, *, share_contexts: bool) -> Joint:
        """Student and teacher rows in one layout.

        Args:
            share_contexts: teacher rows use the student's rows of the tokens with which both prompts begin. Right only
                where both contexts run on the same weights, and without effect if the batch was packed with
                `share_prefix=False`. Each context keeps at least its last prompt token to itself.
        """
        share_contexts = share_contexts and self.share_prefix
        if share_contexts not in self._joint:
            student, offset = self.student.layout, self.student.layout.rows
            device = student.ids.device
            builder = _Builder(offset)
            roots = self._roots() if share_contexts else None
            rows = builder.add(self._prompts[1], self._rollouts * self.contexts, self.share_prefix, roots)
            own = builder.layout(device)
            layout = Layout(
                torch.cat([student.ids, own.ids]),
                torch.cat([student.positions, own.positions]),
                student.segments + own.segments,
            )
            self._joint[share_contexts] = Joint(layout, student, self.student.rows, _index(rows, device))
        return self._joint[share_contexts]

    def _roots(self) -> list[Range]:
        """For each of the teacher's prompts the student's rows that it can use too."""
        students, teachers = self._prompts
        starts = _Builder(0).starts(students, self._rollouts)
        return [
            (start, start + _common(student[:-1], teacher[:-1]))
            for start, student, teacher in zip(starts * self.contexts, students * self.contexts, teachers, strict=True)
        ]


def pack_dual_context(
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    *,
    share_prefix: bool = True,
    contexts: int = 1,
) -> DualContextBatch:
    """Lays out [student prompt | rollout] and [teacher prompt | rollout] as packed rows, on the CPU.

    Args:
        student_prompts: B lists of token ids, none of them empty.
        teacher_prompts: K·B lists of token ids, none of them empty: all of the first context, then all of the second,
            and so on, as the teacher's K·R hidden states are.
        rollouts: for each prompt one rollout (a list of token ids) or several (a list of such lists), taken verbatim.
            An empty rollout is numbered but contributes no row.
        share_prefix: compute a prompt once for all its rollouts (equal prompts count as one), and permit the two
            contexts to share the beginning of their prompts.
        contexts: K, the number of constant contexts in which the same rollouts are read, usually one.

    Raises:
        TypeError, ValueError: an argument is not of this form; the message says which one, where, and what it was.
    """
    if not isinstance(share_prefix, bool):
        raise TypeError(f"share_prefix must be True or False, got {share_prefix!r}")
    students = _prompts("student_prompts", student_prompts)
    teachers = _prompts("teacher_prompts", teacher_prompts)
    written = _rollout_lists(rollouts)
    if isinstance(contexts, bool) or not isinstance(contexts, int) or contexts < 1:
        raise ValueError(f"contexts must be a positive int, got {contexts!r}")
    for name, other, each in (("teacher_prompts", teachers, contexts), ("rollouts", written, 1)):
        if len(other) != each * len(students):
            entries = "one entry" if each == 1 else f"{each} entries"
            raise ValueError(
                f"{name} must have {entries} for each of {len(students)} student_prompts, got {len(other)}"
            )
    flat = list(chain.from_iterable(written))
    return DualContextBatch(
        target_ids=_index(chain.from_iterable(flat), "cpu"),
        sequence_ids=_index((i for i, rollout in enumerate(flat) for _ in rollout), "cpu"),
        student=_context(students, written, share_prefix),
        teacher=_context(teachers, written * contexts, share_prefix),
        share_prefix=share_prefix,
        contexts=contexts,
        _prompts=(students, teachers),
        _rollouts=written,
    )


def fill_token_budget(
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]],
    *,
    tokens: int,
    share_prefix: bool = True,
) -> list[list[int]]:
    """Numbers of the prompts to pack together, so that each micro-batch holds at most `tokens` rows of both contexts.

    The longest come first, so that memory runs out at once if it ever does. A prompt stays with all its rollouts; one
    that exceeds the budget by itself gets a micro-batch of its own. The other arguments and the errors are those of
    `pack_dual_context`; rows that the two contexts may come to share are counted twice.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a positive int, got {tokens!r}")
    students, teachers = _prompts("student_prompts", student_prompts), _prompts("teacher_prompts", teacher_prompts)
    written = _rollout_lists(rollouts)
    if not len(students) == len(teachers) == len(written):
        raise ValueError(
            "student_prompts, teacher_prompts and rollouts must be equally long, "
            f"got {len(students)}, {len(teachers)} and {len(written)}"
        )
    sizes = [
        sum(_rows_of(len(prompt), [len(r) for r in own if r], share_prefix) for prompt in pair)
        for *pair, own in zip(students, teachers, written, strict=True)
    ]
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((b for b, left in enumerate(room) if sizes[i] <= left), None)
        if place is None:
            bins.append([])
            room.append(tokens)
            place = len(bins) - 1
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins


def _rows_of(prompt: int, rollouts: list[int], share: bool) -> int:
    prompts = min(len(rollouts), 1) if share else len(rollouts)
    return prompts * prompt + sum(rollouts) - len(rollouts)


class _Builder:
    """Appends contexts to a growing layout whose first row is number `offset`."""

    def __init__(self, offset: int):
        self.offset = offset
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []

    def add(
        self,
        prompts: list[list[int]],
        rollouts: list[list[list[int]]],
        share: bool,
        roots: list[Range] | None = None,
    ) -> list[int]:
        """Adds every rollout after its prompt; returns for each rollout token, in order, the row that predicts it.

        `roots[i]` are rows elsewhere that already hold the beginning of prompt i.
        """
        rows: dict[tuple[int, int], list[int]] = {}
        for prompt, members in _groups(prompts, rollouts, share):
            root = roots[members[0][0]] if roots else (0, 0)
            prefix = (root,) if root[0] < root[1] else ()
            rest = prompt[root[1] - root[0] :]
            if len(members) == 1:
                (i, g) = members[0]
                start = self._append([*rest, *rollouts[i][g][:-1]], prefix)
                rows[i, g] = [start + len(rest) - 1 + t for t in range(len(rollouts[i][g]))]
                continue
            start = self._append(rest, prefix)
            last = start + len(rest) - 1
            for i, g in members:
                own = rollouts[i][g][:-1]
                first = self._append(own, (*prefix, (start, last + 1))) if own else 0
                rows[i, g] = [last, *range(first, first + len(own))]
        return [row for key in sorted(rows) for row in rows[key]]

    def starts(self, prompts: list[list[int]], rollouts: list[list[list[int]]]) -> list[int]:
        """The first row of each prompt where prompts are shared; 0 for a prompt without any row."""
        starts, row = [0] * len(prompts), self.offset
        for prompt, members in _groups(prompts, rollouts, share=True):
            for i, _ in members:
                starts[i] = row
            row += len(prompt) + sum(len(rollouts[i][g]) - 1 for i, g in members)
        return starts

    def layout(self, device: torch.device | str) -> Layout:
        return Layout(_index(self.ids, device), _index(self.positions, device), tuple(self.segments))

    def _append(self, ids: list[int], prefix: tuple[Range, ...]) -> int:
        start = self.offset + len(self.ids)
        segment = Segment(start, start + len(ids), prefix)
        self.segments.append(segment)
        self.ids += ids
        self.positions += range(segment.position, segment.position + len(ids))
        return start


def _groups(
    prompts: list[list[int]], rollouts: list[list[list[int]]], share: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Prompts in order of appearance, each with the (prompt, rollout) numbers of the rollouts to be laid out after it:
    all that follow the same ids if they share, else one at a time."""
    found: dict[Any, tuple[list[int], list[tuple[int, int]]]] = {}
    for i, (prompt, own) in enumerate(zip(prompts, rollouts, strict=True)):
        key = tuple(prompt) if share else None
        for g, rollout in enumerate(own):
            if rollout:
                found.setdefault(key if share else (i, g), (prompt, []))[1].append((i, g))
    return list(found.values())


def _context(prompts: list[list[int]], rollouts: list[list[list[int]]], share: bool) -> Context:
    builder = _Builder(0)
    rows = builder.add(prompts, rollouts, share)
    return Context(builder.layout("cpu"), _index(rows, "cpu"), _index(sorted(set(rows)), "cpu"))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _index(values: Iterable[int], device: torch.device | str) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64, device=device)


def _sequence(name: str, value: Any, of: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} must be a list of {of}, got {type(value).__name__}")
    return value


def _token_ids(name: str, value: Any) -> list[int]:
    ids = list(_sequence(name, value, "token ids"))
    if all(type(token) is int for token in ids) and min(ids, default=0) >= 0 and max(ids, default=0) <= _LARGEST:
        return ids
    for i, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, Integral):
            raise TypeError(f"{name}[{i}] must be a token id (an int), got {token!r}")
        if not 0 <= int(token) <= _LARGEST:
            raise ValueError(f"{name}[{i}] must be a token id (an int from 0 to {_LARGEST}), got {token}")
    return [int(token) for token in ids]


def _prompts(name: str, value: Any) -> list[list[int]]:
    prompts = [_token_ids(f"{name}[{i}]", p) for i, p in enumerate(_sequence(name, value, "lists of token ids"))]
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"{name}[{i}] must have at least one token id, got an empty list")
    return prompts


def _rollout_lists(value: Any) -> list[list[list[int]]]:
    result = []
    for i, own in enumerate(_sequence("rollouts", value, "rollouts")):
        own, name = list(_sequence(f"rollouts[{i}]", own, "token ids or of lists of token ids")), f"rollouts[{i}]"
        several = bool(own) and isinstance(own[0], Sequence)
        result.append(
            [_token_ids(f"{name}[{g}]", r) for g, r in enumerate(own)] if several else [_token_ids(name, own)]
        )
    return result
