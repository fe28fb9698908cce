"""The row pass in few instructions, for nearly all rows: the device's side.

`lean_kernel` serves divergences of logits under one scale, without caps or an entry clip. It takes less care than
`triton_careful` and knows where that is not enough: a row with −inf, NaN, a gap beyond `FAR`, or whose models are far
from where its first tile says, it leaves alone and marks as `declined`, for the careful kernel to do.

Everything is in bits, nats·log2 e. For a token of a row, with x the logits and s their scale over the temperature,

    a = s·x_T − K              K: an integer near the first tile's maximum, or the target's. Then the difference is
                               exact, and 2^a in range.
    G = s·(x_S − x_T) − C      C: a mean gap. A constant between the models would cost G its digits.
    d = G − δ                  δ = log2 Σ2^(a + G) − log2 Σ2^a, so that d = log2 p_S − log2 p_T

and p_T = 2^a / Σ2^a, p_S = p_T·2^d. What a token adds to the divergence is p_T·f(d). Its gradient, before the mean is
taken off, is p_T·(2^d − 1) for the forward KL and c·p_S·y(d) otherwise: for the reverse KL y = d and c = ln 2, for the
JSD y = log2 m − log2 p_S and c = (β − 1)·ln 2. Near 0, f and y are power series.

The first sweep sums 2^a, 2^(a + G), and 2^a·(2^G − 1), which gives δ as accurately as G is known; and what gives the
mean of y over p_S: for the reverse KL that of G, for the JSD that of y(G), which `_shifted_mean` takes from G to d.
Both hold where δ is not much larger than the gaps' spread. Where it is, the sweep is done again with C + δ for C. The
last sweep writes the gradient.

A token with nearly all of a row's p_S is *sure*. What is left of its gradient, some 1 − p_S of it, drowns in rounding,
but a row's gradient sums to 0: it is what the others' sum to, with the other sign.

What it cannot do: where the models disagree so much that y is nearly the same for all likely tokens, y less its mean
loses digits (a gap of 5 nats costs 1e-5 of the gradient).
"""

from __future__ import annotations

from ..triton_jit import LN2, LOG2E, constant, exp2, fma, jit, log2, reciprocal, tl
from .triton_careful import FORWARD_KL, JSD, _log1p, _store, _token, _write_token

FAR = constant(60.0)  # bits, of G
LOST = constant(76.0)  # Σ2^(a + G) must be above 2^(max |G| − LOST): what 2^a lost below its range is 2^−33 of that
LARGE = constant(1e18)  # of a normaliser: the reciprocal of a smaller one, times a small weight, is in range
NEAR = constant(0.25 / 0.6931471805599453)  # bits: where the error of five terms meets that of exp2 and log2
SURE = constant(0.75)
GONE = constant(-1e4)  # an a whose 2^a is 0, while 0·a is no NaN
SPREADS = constant(16.0)  # δ may be so many times the gaps' spread: what its size costs is 1e-6 of that
EXACT = constant(1e-6)  # the error that the mean of a row's y may have, relative to the spread of y

# ln2^n / n!: 2^x − 1 − x·ln 2 from the square on
E2, E3, E4 = constant(0.24022650695910072), constant(0.05550410866482158), constant(0.009618129107628477)
E5, E6 = constant(0.0013333558146428443), constant(0.00015403530393381608)


@jit()
def _tile(student, teacher, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Float32 logits of columns [start, start + BLOCK), 0 past `end`, and which are before it: all, if not MASKED."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < end
    if MASKED:
        x_s = tl.load(student + columns, mask=inside, other=0.0)
        x_t = tl.load(teacher + columns, mask=inside, other=0.0)
    else:
        x_s, x_t = tl.load(student + columns), tl.load(teacher + columns)
    return x_s.to(tl.float32), x_t.to(tl.float32), inside


@jit()
def _frame(student, teacher, targets, row, columns, scale, BLOCK: tl.constexpr):
    """K and C from the row's first tile and its target; any integer and any finite number would be correct.

    A sampled token is likely, and its gap therefore near the row's mean. Returns the target's logits too (0: none).
    """
    x_s, x_t, inside = _tile(student, teacher, 0, columns, BLOCK, True)
    top = tl.max(tl.where(inside, x_t, float("-inf")), 0)
    target_s, target_t = top * 0.0, top * 0.0
    if targets is not None:
        target = tl.load(targets + row)
        there = (target >= 0) & (target < columns)
        target_s = tl.load(student + target, mask=there, other=float("nan")).to(tl.float32)
        target_t = tl.load(teacher + target, mask=there, other=float("nan")).to(tl.float32)
        top = tl.maximum(top, tl.where(there, target_t, top))
    weight = tl.where(inside, exp2((x_t - top) * scale), 0.0)
    total, centre = tl.sum(weight, 0), tl.sum(tl.where(inside, weight * (x_s - x_t), 0.0), 0)
    if targets is not None:  # a target of the first tile counts twice
        weight = tl.where(there, tl.exp2((target_t - top) * scale), 0.0)
        total, centre = total + weight, centre + tl.where(there, weight * (target_s - target_t), 0.0)
    level, centre = tl.floor(top * scale), centre / total * scale
    level, centre = tl.where(tl.abs(level) < 1e30, level, 0.0), tl.where(tl.abs(centre) < 1e30, centre, 0.0)
    return level, centre, target_s, target_t


@jit()
def _pair(student, teacher, start, end, scale, level, centre, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """a and G of a tile; past `end`, 2^a and G are 0."""
    x_s, x_t, inside = _tile(student, teacher, start, end, BLOCK, MASKED)
    a, gap = fma(x_t, scale, -level), fma(x_s - x_t, scale, -centre)
    if MASKED:
        a, gap = tl.where(inside, a, GONE), tl.where(inside, gap, 0.0)
    return a, gap


@jit()
def _exp2m1(x, power):
    """2^x − 1, given 2^x."""
    series = x * fma(x, fma(x, fma(x, fma(x, fma(x, E6, E5), E4), E3), E2), LN2)
    return tl.where(tl.abs(x) < NEAR, series, power - 1.0)


@jit()
def _log2_ratio(d, power, mixture, y_series):
    """y of the JSD, log2 m − log2 p_S with m = β·p_T + (1 − β)·p_S, where d = log2 p_S − log2 p_T; also m / p_T."""
    beta, one_minus_beta = mixture
    y1, y2, y3, y4, y5 = y_series
    m = fma(power, one_minus_beta, beta)
    small = d * fma(d, fma(d, fma(d, fma(d, y5, y4), y3), y2), y1)
    return tl.where(tl.abs(d) < NEAR, small, log2(m) - d), m


@jit()
def _first_tile_sums(
    sums, student, teacher, start, end, scale, level, centre, mixture, y_series,
    KIND: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a tile to max |G|, Σ2^a, Σ2^a·(2^G − 1), Σw, Σw·v, Σw·v² and, for the JSD with MEAN, Σw·v³ and Σw·y(G).

    w = 2^(a + G); v is (2^G − 1)·p_T / m for the JSD, G for the KLs.
    """
    furthest, sum_t, excess, sum_s, v1, v2, v3, mean = sums
    a, gap = _pair(student, teacher, start, end, scale, level, centre, BLOCK, MASKED)
    w_t, power = exp2(a), exp2(gap)
    less_one = _exp2m1(gap, power)
    furthest = tl.maximum(furthest, tl.abs(gap))
    sum_t += w_t
    excess = fma(w_t, less_one, excess)
    w = w_t * power
    sum_s += w
    v = gap
    if KIND == JSD:
        y, m = _log2_ratio(gap, power, mixture, y_series)
        v = less_one * reciprocal(m)
        if MEAN:
            mean = fma(w, y, mean)
    w *= v
    v1 += w
    if KIND == JSD and MEAN:
        w *= v
        v2 += w
        v3 = fma(w, v, v3)
    else:
        v2 = fma(w, v, v2)
    return furthest, sum_t, excess, sum_s, v1, v2, v3, mean


@jit()
def _first_sweep(
    student, teacher, columns, scale, level, centre, mixture, y_series,
    KIND: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ2^a, δ, the mean of y over p_S (with MEAN), whether the row is for this kernel, and whether C is near enough."""
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero)
    start = 0
    while start + BLOCK <= columns:
        sums = _first_tile_sums(
            sums, student, teacher, start, columns, scale, level, centre, mixture, y_series, KIND, MEAN, BLOCK, False
        )
        start += BLOCK
    if start < columns:
        sums = _first_tile_sums(
            sums, student, teacher, start, columns, scale, level, centre, mixture, y_series, KIND, MEAN, BLOCK, True
        )
    furthest, sum_t, excess, sum_s = tl.max(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0)
    # each comparison is false for NaN
    fit = (furthest <= FAR) & (sum_t < LARGE) & (sum_s < LARGE) & (sum_s > tl.exp2(furthest - LOST))
    x = excess / sum_t
    drift = tl.where(tl.abs(x) < 0.5, _log1p(x, 1.0 + x) * LOG2E, tl.log2(sum_s) - tl.log2(sum_t))
    v1, v2 = tl.sum(sums[4], 0) / sum_s, tl.sum(sums[5], 0) / sum_s
    variance, mean = v2 - v1 * v1, v1 - drift
    near = drift * drift <= SPREADS * SPREADS * variance
    if KIND == JSD:
        near = drift * drift * (LN2 * LN2) <= SPREADS * SPREADS * variance
        if MEAN:
            v3, mean = tl.sum(sums[6], 0) / sum_s, tl.sum(sums[7], 0) / sum_s
            mean, left = _shifted_mean(mean, v1, v2, v3, drift, mixture)
            beta, _ = mixture
            near = near & (left * left <= EXACT * EXACT * beta * beta * variance)
    return sum_t, drift, mean, fit, near


@jit()
def _shifted_mean(mean, v1, v2, v3, drift, mixture):
    """The JSD's Σp_S·y(G − δ) from the means over p_S of y(G) and of v's powers, and a bound on its error in nats.

    With η = 2^δ − 1 and v as above, y(G − δ) = y(G) + log2(1 + β·η) + log2(1 + k·v), k = −β(1 − β)·η / (1 + β·η), and
    the last logarithm's series is cut after k³v³.
    """
    beta, one_minus_beta = mixture
    eta = _exp2m1(drift, tl.exp2(drift))
    k = -beta * one_minus_beta * eta / (1.0 + beta * eta)
    series = k * (v1 - k * (v2 / 2 - k * (v3 / 3)))
    # |k·v|, as v is between −1 / β and 1 / (1 − β)
    largest = tl.abs(k) * tl.maximum(1.0 / beta, 1.0 / one_minus_beta)
    left = tl.where(largest < 0.5, k * k * v2 * largest * largest / 4 / (1.0 - largest), float("inf"))
    return mean + (_log1p(beta * eta, 1.0 + beta * eta) + series) * LOG2E, left


@jit()
def _terms(d, power, mixture, y_series, f_series, KIND: tl.constexpr):
    """f(d), the divergence over p_T in nats, and the y(d) that the gradient is made of; `power` is 2^d."""
    beta, _ = mixture
    f2, f3, f4, f5, f6 = f_series
    near = tl.abs(d) < NEAR
    small = d * d * fma(d, fma(d, fma(d, fma(d, f6, f5), f4), f3), f2)
    if KIND == JSD:
        y, m = _log2_ratio(d, power, mixture, y_series)
        large = fma(m, y, beta * d) * -LN2
    elif KIND == FORWARD_KL:
        large = fma(d, -LN2, power - 1.0)
        y = tl.where(near, fma(d, LN2, small), power - 1.0)
    else:
        large = fma(d * LN2, power, 1.0 - power)
        y = d
    return tl.where(near, small, large), y


@jit()
def _last_tile(
    sums, student, teacher, dz, start, end, scale, level, centre, drift, log_t, mixture, y_series, f_series,
    sure, gradient, KIND: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a tile to Σ2^a·f and (STATS) Σ2^a·log2 p_T and Σ2^(a + d)·log2 p_S; writes dz, adds it up but for a sure
    token's, and finds that token's column."""
    total, h_s, h_t, rest, column = sums
    a, gap = _pair(student, teacher, start, end, scale, level, centre, BLOCK, MASKED)
    d = gap - drift
    w, power = exp2(a), exp2(d)
    w_s = w * power
    f, y = _terms(d, power, mixture, y_series, f_series, KIND)
    total = fma(w, f, total)
    if STATS:
        log_p = tl.maximum(a - log_t, GONE)
        h_t = fma(w, log_p, h_t)
        h_s = fma(w_s, log_p + d, h_s)
    if dz is not None:
        slope, shift = gradient
        value = w * y * slope if KIND == FORWARD_KL else w_s * fma(y, slope, shift)
        rest += tl.where(w_s > sure, 0.0, value)
        column = tl.where(w_s > sure, start + tl.arange(0, BLOCK), column)
        _store(dz, start, end, value, BLOCK, MASKED)
    return total, h_s, h_t, rest, column


@jit()
def _last_sweep(
    student, teacher, dz, columns, scale, level, centre, drift, log_t, mixture, y_series, f_series, sure, gradient,
    KIND: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of `_last_tile` over the row, and a sure token's column (−1: there is none)."""
    zero = tl.zeros((BLOCK,), tl.float32)
    sums = (zero, zero, zero, zero, tl.full((BLOCK,), -1, tl.int32))
    start = 0
    while start + BLOCK <= columns:
        sums = _last_tile(
            sums, student, teacher, dz, start, columns, scale, level, centre, drift, log_t, mixture, y_series, f_series,
            sure, gradient, KIND, STATS, BLOCK, False,
        )  # fmt: skip
        start += BLOCK
    if start < columns:
        sums = _last_tile(
            sums, student, teacher, dz, start, columns, scale, level, centre, drift, log_t, mixture, y_series, f_series,
            sure, gradient, KIND, STATS, BLOCK, True,
        )  # fmt: skip
    return tl.sum(sums[0], 0), tl.sum(sums[1], 0), tl.sum(sums[2], 0), tl.sum(sums[3], 0), tl.max(sums[4], 0)


@jit("columns", "table_stride")
def lean_kernel(
    student, teacher, dz, table, targets, row_scale, declined, columns,
    student_stride, teacher_stride, dz_stride, table_stride, token_stride,
    scale, mixture, y_series, f_series, token_clip, slope, grad_factor,
    KIND: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row; dz, targets and row_scale may be None. `declined`, (n,): 1 where the row is left undone."""
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    table += row * token_stride
    level, centre, target_s, target_t = _frame(student, teacher, targets, row, columns, scale, BLOCK)
    sum_t, drift, mean, fit, near = _first_sweep(
        student, teacher, columns, scale, level, centre, mixture, y_series, KIND, dz is not None, BLOCK
    )
    if fit & (near == 0):
        centre += drift
        sum_t, drift, mean, fit, near = _first_sweep(
            student, teacher, columns, scale, level, centre, mixture, y_series, KIND, dz is not None, BLOCK
        )
    tl.store(declined + row, tl.where(fit, 0, 1))
    if fit:
        log_t = tl.log2(sum_t)
        if STATS and targets is not None:
            log_p = fma(target_t, scale, -level) - log_t
            tl.store(table + 7 * table_stride, (log_p + (fma(target_s - target_t, scale, -centre) - drift)) * LN2)
            tl.store(table + 8 * table_stride, log_p * LN2)
        gradient = (0.0, 0.0)
        if dz is not None:
            dz += row * dz_stride
            weight = slope * grad_factor / sum_t
            if row_scale is not None:
                weight *= tl.load(row_scale + row).to(tl.float32)
            gradient = (weight, -mean * weight)
        total, h_s, h_t, rest, sure_column = _last_sweep(
            student, teacher, dz, columns, scale, level, centre, drift, log_t, mixture, y_series, f_series,
            SURE * sum_t, gradient, KIND, STATS, BLOCK,
        )  # fmt: skip
        loss, divergence, clipped, amount, over, kept = _token(total / sum_t, 0.0, fit, token_clip)
        if dz is not None:
            tl.debug_barrier()  # what follows goes over what the sweep wrote
            if sure_column >= 0:
                tl.store(dz + sure_column, (-rest).to(dz.dtype.element_ty))
            if kept == 0:  # a clipped token, which only the whole row can tell: rare
                tl.debug_barrier()
                zero = tl.zeros((BLOCK,), tl.float32)
                start = 0
                while start < columns:
                    _store(dz, start, columns, zero, BLOCK, True)
                    start += BLOCK
        _write_token(table, table_stride, loss, divergence, clipped, amount, over, -h_s / sum_t, -h_t / sum_t, STATS)
