"""Weights of tokens, as pure functions of (N,) constants.

`sequence_ids` is (N,) int64: tokens of one number are one sequence, in the order in which they stand. Nothing here
loops over tokens; functions with `sequence_ids` wait for the device, for the number of sequences and the longest.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Which place each of N tokens has in its sequence."""

    row: Tensor  #: (N,) int64, the sequence, counted from 0
    position: Tensor  #: (N,) int64, the place within it
    lengths: Tensor  #: (S,) int64

    @classmethod
    def of(cls, sequence_ids: Tensor) -> "Sequences":
        _, row, lengths = torch.unique(sequence_ids, return_inverse=True, return_counts=True)
        order = row.argsort(stable=True)
        starts = lengths.cumsum(0) - lengths
        position = torch.empty_like(row)
        position[order] = torch.arange(len(row), device=row.device) - starts[row[order]]
        return cls(row, position, lengths)

    @property
    def length(self) -> Tensor:
        """(N,) int64: how many tokens the token's sequence has."""
        return self.lengths[self.row]

    def padded(self, values: Tensor, fill: float) -> Tensor:
        """(S, longest): one row for each sequence; read it back with `[self.row, self.position]`."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        table = values.new_full((len(self.lengths), longest), fill)
        table[self.row, self.position] = values
        return table

    def sum(self, values: Tensor) -> Tensor:
        """(S,): the sum over each sequence, with a gradient."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.row, values)

    def mean(self, values: Tensor) -> Tensor:
        """(N,): the mean over the token's sequence."""
        return (self.sum(values) / self.lengths)[self.row]


def threshold(values: Tensor, limit: float) -> Tensor:
    """1[x > limit], (N,) bool. EDGE-OPD (arXiv 2605.23493) keeps the tokens that the reference makes likelier."""
    return values > limit


def top_fraction(scores: Tensor, fraction: float, sequence_ids: Tensor, fallback: Tensor | None = None) -> Tensor:
    """The ceil(fraction·N) highest scores of the batch, (N,) bool; of equal ones the earlier.

    A sequence of which none is among them keeps its token of the highest `fallback` (default: the score), so that each
    has at least one. As in TA-OPD (arXiv 2605.26844).
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if not len(scores):
        return kept
    count = math.ceil(fraction * len(scores) - 1e-9)  # 0.1 * 30 is a little above 3
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    sequences = Sequences.of(sequence_ids)
    best = sequences.padded(scores if fallback is None else fallback, -math.inf).argmax(1)
    without = sequences.sum(kept.long()) == 0
    return kept | (without[sequences.row] & (sequences.position == best[sequences.row]))


def qnorm(values: Tensor, low: float = 0.05, high: float = 0.95) -> Tensor:
    """clip((x − Q_low)/(Q_high − Q_low), 0, 1) with linearly interpolated quantiles of all N values.

    0 where the quantiles are less than 1e-12 apart. As in TA-OPD (arXiv 2605.26844).
    """
    if not len(values):
        return values
    bounds = torch.quantile(values, torch.tensor([low, high], dtype=values.dtype, device=values.device))
    spread = bounds[1] - bounds[0]
    return torch.where(spread < 1e-12, 0.0, ((values - bounds[0]) / spread.clamp(min=1e-12)).clamp(0, 1))


def window_min(values: Tensor, window: int, sequence_ids: Tensor) -> Tensor:
    """The least of a token's value and those of the `window` − 1 tokens after it in its sequence.

    CL-EGRSD (arXiv 2605.13255) takes it of the teacher's entropy.
    """
    if not len(values):
        return values
    sequences = Sequences.of(sequence_ids)
    table = sequences.padded(values, math.inf)
    window = min(window, table.shape[1])
    table = torch.nn.functional.pad(table, (0, window - 1), value=math.inf)
    return table.unfold(1, window, 1).amin(2)[sequences.row, sequences.position]


def hysteresis(open: Tensor, values: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """A gate with two limits: an open one stays open down to `low`, a closed one opens above `high`.

    `open` is the state before, bool, of the shape of `values`. As the gate of AntiSD (arXiv 2605.11609).
    """
    return (open & (values >= low)) | (values > high)


def in_ids(target_ids: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Which tokens are in the set, (N,) bool. Rock (arXiv 2605.09253) leaves those out."""
    return torch.isin(target_ids, torch.tensor(ids, dtype=target_ids.dtype, device=target_ids.device))


def suffix_sum(values: Tensor, sequence_ids: Tensor, strict: bool) -> Tensor:
    """The sum over the later tokens of the same sequence, with the token's own value unless `strict`.

    DistIL (arXiv 2606.05152) weighs a token's policy gradient by the strict one.
    """
    sequences = Sequences.of(sequence_ids)
    sums = sequences.padded(values, 0.0).flip(1).cumsum(1).flip(1)
    if strict:
        sums = torch.nn.functional.pad(sums, (0, 1))[:, 1:]  # not sums - values, in which digits cancel
    return sums[sequences.row, sequences.position]


def per_sequence_znorm(values: Tensor, sequence_ids: Tensor) -> Tensor:
    """Zero mean and unit variance (of the population) within each sequence; 0 in one whose values are all equal.

    As in AntiSD (arXiv 2605.11609).
    """
    sequences = Sequences.of(sequence_ids)
    mean = sequences.mean(values)
    centred = values - mean
    deviation = sequences.mean(centred.square()).sqrt()
    flat = deviation <= 8 * torch.finfo(values.dtype).eps * mean.abs()
    return torch.where(flat, 0.0, centred / torch.where(flat, 1.0, deviation))


def ratio_clip(log_ratio: Tensor, cap: float) -> Tensor:
    """min(e^x, cap) without overflow. SDPO (arXiv 2601.20802) caps the ratio to the old policy at 2."""
    return log_ratio.clamp(max=math.log(cap)).exp()


def clip1(values: Tensor, width: float) -> Tensor:
    """clip(x, 1 − width, 1 + width), as RLSD (arXiv 2604.03128) and PPO clip ratios."""
    return values.clamp(1 - width, 1 + width)


def linear_decay(start: float, step: float | Tensor, steps: int) -> Tensor:
    """start·max(0, 1 − step/steps). CEPO (arXiv 2605.19436) takes its coefficient to 0 in 25 steps."""
    return start * (1 - torch.as_tensor(step, dtype=torch.float64) / steps).clamp(0, 1)


def phi(difference: Tensor) -> Tensor:
    """½·(softplus(d) − ln 2) = ½·ln((1 + e^d)/2), the sampled-token weight of the JSD at beta 0.5 (AntiSD, OPD+)."""
    return 0.5 * (torch.nn.functional.softplus(difference) - math.log(2))


def jsd_weight(difference: Tensor, beta: float) -> Tensor:
    """The weight w of −w·log p_S(y) whose expectation over y ~ p_S is the gradient of the divergence at `beta`.

    With d = log p_T(y) − log p_S(y): e^d at 0 (forward KL), d − 1 at 1 (reverse KL), between
    (1 − β)·ln((1 − β) + β·e^d). From OPD+ (arXiv 2606.01039).
    """
    if beta == 0:
        return difference.exp()
    if beta == 1:
        return difference - 1
    base = difference.new_tensor(math.log1p(-beta))
    return (1 - beta) * torch.logaddexp(base, math.log(beta) + difference)


def log1mexp(logprob: Tensor) -> Tensor:
    """ln(1 − e^x) for x ≤ 0, with a gradient; of x = 0 that of the nearest number below it, and no gradient."""
    x = logprob.clamp(max=-torch.finfo(logprob.dtype).eps)
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(x)).log(), torch.log1p(-torch.where(near, -1.0, x).exp()))
