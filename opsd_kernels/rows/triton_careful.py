"""The row pass with all care, for every objective and every row: the device's side.

A row is read in sweeps, by one program (many rows) or by several that meet in a small scratch buffer (few rows):

1. normalisers of both models, online, and their difference as log1p(Σ(w_S − w_T) / Σ w_T), where each w_S − w_T comes
   from expm1 of the logits' gap: as accurate as the gap itself, so that nothing needs re-centring afterwards;
2. sums: the loss, statistics, and Σg where the gradient g − p_S·Σg needs it before it can be written;
3. the gradient.

Without an entry clip the KLs know Σg after sweep 1 (0, and the estimate of the divergence), so 2 and 3 are one sweep,
but for rows where one token has nearly all the probability. There g − p_S·Σg would keep the part 1 − p_S of the token's
own g, which float32 does not know. Any multiple of p_S may be taken off g first, so what leaves nothing of its g is:
the row's `level`.

Units: `u` is what the hot loops subtract and compare, `nats` and `bits` turn it into arguments of exp and exp2. It is
the raw logit where both models only scale theirs alike, the tempered logit otherwise. The student's u is shifted by an
`offset`, the mean gap of the row's first tile: a constant between the models would otherwise cost the gap its digits.

Lanes: sweeps accumulate in vectors of one tile and reduce once at the end, which keeps barriers out of the loops.
"""

from __future__ import annotations

import math

from ..triton_jit import LN2, LOG2E, constant, jit, tl

INF = constant(math.inf)
NEG_INF = constant(-math.inf)
LOWEST = constant(-3.4028234663852886e38)  # a running maximum's start: finite, so that −inf − LOWEST is no NaN
SMALL = constant(0.1)  # |x| under which series replace differences; above, those lose under 5 bits
FAINT = constant(2.0**-60)  # a normaliser this far below the other's scale may have underflowed: sweep again
# Σw under which one token has over 80 % of a row: its gap from the mean, and so its gradient, is far smaller than the
# gaps themselves, and sweep 1's rounding would show in it
CERTAIN = constant(1.25)
SURE = constant(0.5)  # above it, a probability is its row's largest: there is one at most
NEVER = constant(2.0)

FORWARD_KL = constant(0)
REVERSE_KL = constant(1)
JSD = constant(2)

RAW = constant(0)  # one factor for both models: u is the logit as it comes
OWN = constant(1)  # each model has its own scale or cap: u is in nats
SAME_CAP = constant(2)  # one cap for both: u is in nats, the gap from tanh a − tanh b = tanh(a − b)(1 − tanh a tanh b)

SWEEP_PARTIALS = 8  # floats that a split row's program leaves after sweep 1
SUM_PARTIALS = 9  # and after sweep 2
MAX_SPLITS = 32


# Small functions of one tile.


@jit()
def _expm1(x, exp_x):
    """e^x − 1 for x <= 0, given e^x."""
    series = x * (1.0 + x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120)))))
    return tl.where(x > -SMALL, series, exp_x - 1.0)


@jit()
def _log1p(x, one_plus_x):
    """log(1 + x) for x > −1; the caller may know 1 + x better than its rounded sum."""
    tail = 1.0 / 4 - x * (1.0 / 5 - x * (1.0 / 6 - x * (1.0 / 7 - x * (1.0 / 8))))
    series = x * (1.0 - x * (1.0 / 2 - x * (1.0 / 3 - x * tail)))
    return tl.where(tl.abs(x) < SMALL, series, tl.log(one_plus_x))


@jit()
def _phi(x):
    """e^x − 1 − x for |x| < SMALL."""
    return x * x * (1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720)))))


@jit()
def _tanh(x):
    """tanh x and its derivative, neither of which loses digits at its small end."""
    size = tl.abs(x)
    fade = tl.exp2(size * (-2.0 * LOG2E))
    tanh = -_expm1(-2.0 * size, fade) / (1.0 + fade)
    return tl.where(x < 0.0, -tanh, tanh), 4.0 * fade / ((1.0 + fade) * (1.0 + fade))


@jit()
def _load(pointer, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(BLOCK,) float32 logits from column `start` on; columns from `end` on count as −inf."""
    columns = start + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(pointer + columns, mask=columns < end, other=NEG_INF).to(tl.float32)
    return tl.load(pointer + columns).to(tl.float32)


@jit()
def _load_both(student, teacher, absent, start, end, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile of both rows. `absent`: None, or a row of bits; a column whose bit is set counts as −inf, too."""
    x_s, x_t = _load(student, start, end, BLOCK, MASKED), _load(teacher, start, end, BLOCK, MASKED)
    if absent is not None:
        columns = start + tl.arange(0, BLOCK)
        word = tl.load(absent + columns // 32, mask=columns < end, other=0)
        out = ((word >> (columns % 32)) & 1) != 0
        x_s, x_t = tl.where(out, NEG_INF, x_s), tl.where(out, NEG_INF, x_t)
    return x_s, x_t


@jit()
def _store(pointer, start, end, value, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty), mask=columns < end)
    else:
        tl.store(pointer + columns, value.to(pointer.dtype.element_ty))


@jit()
def _own(x, inner, outer, CAP: tl.constexpr):
    """A tempered logit with its tanh and the tanh's derivative; without a cap x·inner, an unused x and 1."""
    if CAP:
        tanh, slope = _tanh(x * inner)
        masked = x == NEG_INF
        y, slope = tl.where(masked, NEG_INF, outer * tanh), tl.where(masked, 0.0, slope)
    else:
        y, tanh, slope = x * inner, x, 1.0
    return y, tanh, slope


@jit()
def _pair(x_s, x_t, offset, transform, LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr):
    """The student's u less the offset, the teacher's u, their gap in nats (0 where both are −inf), the cap's slope."""
    inner_s, outer_s, inner_t, outer_t, nats, _ = transform
    slope = 1.0
    if LINK == RAW:
        u_s, u_t = x_s, x_t
        gap = (x_s - x_t - offset) * nats
    else:
        u_s, tanh_s, slope = _own(x_s, inner_s, outer_s, CAP_S)
        u_t, tanh_t, _ = _own(x_t, inner_t, outer_t, CAP_T)
        if LINK == SAME_CAP:
            apart, _ = _tanh((x_s - x_t) * inner_s)
            gap = outer_s * apart * (1.0 - tanh_s * tanh_t) - offset
            gap = tl.where(u_s == NEG_INF, NEG_INF, tl.where(u_t == NEG_INF, INF, gap))
        else:
            gap = u_s - u_t - offset
    gap = tl.where((u_s == NEG_INF) & (u_t == NEG_INF), 0.0, gap)
    return u_s - offset, u_t, gap, slope


# Sweep 1: normalisers.


@jit()
def _row_offset(
    student, teacher, absent, columns, transform,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The mean gap over the row's first tile, by the teacher's weights, in u. Any finite value is correct."""
    x_s, x_t = _load_both(student, teacher, absent, 0, columns, BLOCK, True)
    u_s, u_t, gap, _ = _pair(x_s, x_t, 0.0, transform, LINK, CAP_S, CAP_T)
    both = (u_s != NEG_INF) & (u_t != NEG_INF)
    top = tl.max(tl.where(both, u_t, LOWEST), 0)
    weight = tl.where(both, tl.exp2((u_t - top) * transform[5]), 0.0)
    offset = tl.sum(tl.where(both, weight * gap, 0.0), 0) / tl.sum(weight, 0) / transform[4]
    return tl.where(tl.abs(offset) < 1e30, offset, 0.0)


@jit()
def _grown(u, m, bits):
    """A running maximum m met by u: whether u is above, and 2 to the minus their distance. NaN stays in the latter."""
    step = (u - m) * bits
    return step > 0.0, tl.exp2(-tl.abs(step))


@jit()
def _normaliser_tile(
    m, s_s, s_t, df, drift, student, teacher, absent, start, end, offset, transform,
    KIND: tl.constexpr, LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds a tile to Σw_S, Σw_T, Σ(w_S − w_T) and (reverse KL) Σw_S·gap; w = e^(u − m), m the larger maximum."""
    x_s, x_t = _load_both(student, teacher, absent, start, end, BLOCK, MASKED)
    u_s, u_t, gap, _ = _pair(x_s, x_t, offset, transform, LINK, CAP_S, CAP_T)
    likelier = gap > 0.0
    high = tl.where(likelier, u_s, u_t)
    apart = tl.abs(gap)
    fade = tl.exp2(apart * -LOG2E)
    above, ratio = _grown(high, m, transform[5])
    keep, w_high = tl.where(above, ratio, 1.0), tl.where(above, 1.0, ratio)
    w_low, step = w_high * fade, w_high * _expm1(-apart, fade)
    w_s = tl.where(likelier, w_high, w_low)
    s_s = s_s * keep + w_s
    s_t = s_t * keep + tl.where(likelier, w_low, w_high)
    df = df * keep + tl.where(likelier, -step, step)
    if KIND == REVERSE_KL:
        drift = drift * keep + tl.where((u_s == NEG_INF) | (u_t == NEG_INF), 0.0, w_s * gap)
    return tl.where(above, high, m), s_s, s_t, df, drift


@jit()
def _apart_tile(
    m_s, s_s, m_t, s_t, drift, student, teacher, absent, start, end, offset, transform,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same with a maximum for each model, for rows whose two levels are too far apart to share one."""
    x_s, x_t = _load_both(student, teacher, absent, start, end, BLOCK, True)
    u_s, u_t, gap, _ = _pair(x_s, x_t, offset, transform, LINK, CAP_S, CAP_T)
    above_s, ratio_s = _grown(u_s, m_s, transform[5])
    above_t, ratio_t = _grown(u_t, m_t, transform[5])
    keep, w_s = tl.where(above_s, ratio_s, 1.0), tl.where(above_s, 1.0, ratio_s)
    drift = drift * keep + tl.where((u_s == NEG_INF) | (u_t == NEG_INF), 0.0, w_s * gap)
    s_s = s_s * keep + w_s
    s_t = tl.where(above_t, s_t * ratio_t + 1.0, s_t + ratio_t)
    return tl.where(above_s, u_s, m_s), s_s, tl.where(above_t, u_t, m_t), s_t, drift


@jit()
def _normalisers(
    student, teacher, absent, begin, end, offset, transform,
    KIND: tl.constexpr, LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 1 over columns [begin, end): m_S, Σw_S, m_T, Σw_T, m, Σ(w_S − w_T) at m, Σw_S·gap at m_S; all scalars."""
    bits = transform[5]
    zero = tl.zeros((BLOCK,), tl.float32)
    m, s_s, s_t, df, drift = zero + LOWEST, zero, zero, zero, zero
    start = begin
    while start + BLOCK <= end:
        m, s_s, s_t, df, drift = _normaliser_tile(
            m, s_s, s_t, df, drift, student, teacher, absent, start, end, offset, transform,
            KIND, LINK, CAP_S, CAP_T, BLOCK, False,
        )  # fmt: skip
        start += BLOCK
    if start < end:
        m, s_s, s_t, df, drift = _normaliser_tile(
            m, s_s, s_t, df, drift, student, teacher, absent, start, end, offset, transform,
            KIND, LINK, CAP_S, CAP_T, BLOCK, True,
        )  # fmt: skip
    top = tl.max(m, 0)
    keep = tl.exp2((m - top) * bits)
    top_s, top_t = top, top
    sum_s, sum_t = tl.sum(s_s * keep, 0), tl.sum(s_t * keep, 0)
    sum_df, sum_drift = tl.sum(df * keep, 0), tl.sum(drift * keep, 0)
    if tl.minimum(sum_s, sum_t) < FAINT:
        m_s, s_s, m_t, s_t, drift = zero + LOWEST, zero, zero + LOWEST, zero, zero
        start = begin
        while start < end:
            m_s, s_s, m_t, s_t, drift = _apart_tile(
                m_s, s_s, m_t, s_t, drift, student, teacher, absent, start, end, offset, transform,
                LINK, CAP_S, CAP_T, BLOCK,
            )  # fmt: skip
            start += BLOCK
        top_s, top_t = tl.max(m_s, 0), tl.max(m_t, 0)
        keep = tl.exp2((m_s - top_s) * bits)
        sum_s, sum_drift = tl.sum(s_s * keep, 0), tl.sum(drift * keep, 0)
        sum_t = tl.sum(s_t * tl.exp2((m_t - top_t) * bits), 0)
    return top_s, sum_s, top_t, sum_t, top, sum_df, sum_drift


@jit()
def _settled(top_s, sum_s, top_t, sum_t, top, sum_df, transform):
    """From sweep 1's sums: (m_S, log2 Σw_S, m_T, log2 Σw_T, log Z_S − log Z_T in nats), and whether the row is live."""
    nats, bits = transform[4], transform[5]
    dead_s, dead_t = sum_s == 0.0, sum_t == 0.0
    l_s, l_t = tl.where(dead_s, 0.0, tl.log2(sum_s)), tl.where(dead_t, 0.0, tl.log2(sum_t))
    top_s, top_t = tl.where(dead_s, 0.0, top_s), tl.where(dead_t, 0.0, top_t)
    common_s, common_t = sum_s * tl.exp2((top_s - top) * bits), sum_t * tl.exp2((top_t - top) * bits)
    x = sum_df / common_t
    paired = (tl.minimum(common_s, common_t) >= FAINT) & (tl.abs(x) < 0.5)
    drift = tl.where(paired, _log1p(x, 1.0 + x), (top_s - top_t) * nats + (l_s - l_t) * LN2)
    return (top_s, l_s, top_t, l_t, tl.where(dead_s | dead_t, 0.0, drift)), (dead_s | dead_t) == 0


# Sweeps 2 and 3: sums and the gradient.


@jit()
def _terms(u_s, u_t, gap, norms, clips, KIND: tl.constexpr, CLIP: tl.constexpr):
    """A tile's p_S, p_T, log2 of both, summand of the divergence, ℓ and whether it is infinite, g, and g − p_S.

    The last is for the clipped forward KL, whose p_S would swallow a small p_T where the models are far apart.
    """
    m_s, l_s, m_t, l_t, drift = norms
    beta, one_minus_beta, tau, _, bits = clips
    no_s, no_t = u_s == NEG_INF, u_t == NEG_INF
    d = gap - drift  # log p_S − log p_T
    b_s, b_t = (u_s - m_s) * bits - l_s, (u_t - m_t) * bits - l_t
    likelier = d > 0.0
    apart = tl.abs(d)
    fade = tl.exp2(apart * -LOG2E)
    p_high = tl.exp2(tl.where(likelier, b_s, b_t))
    p_low = p_high * fade
    p_s, p_t = tl.where(likelier, p_high, p_low), tl.where(likelier, p_low, p_high)
    down = _expm1(-apart, fade)
    r = p_high * tl.where(likelier, -down, down)  # p_S − p_T
    near = apart < SMALL
    if KIND == FORWARD_KL:
        entry = tl.where(no_s | no_t, 0.0, -(p_t * d))
        summand, infinite = tl.where(near, p_t * _phi(d), entry + r), no_s & (no_t == 0)
        g = r
    elif KIND == REVERSE_KL:
        entry = tl.where(no_s | no_t, 0.0, p_s * d)
        summand, infinite = tl.where(near, p_s * _phi(-d), entry - r), no_t & (no_s == 0)
        g = tl.where(no_s | no_t, 0.0, p_s * gap)  # not p_S·d: the drift cancels, and the gap has digits that d lacks
    else:
        low, high = tl.where(likelier, beta, one_minus_beta), tl.where(likelier, one_minus_beta, beta)
        over_high = _log1p(low * down, high + low * fade)  # log of m over the likelier of the two
        over_low = over_high + apart
        entry = -(high * p_high * over_high) - tl.where(p_low == 0.0, 0.0, low * p_low * over_low)
        # entry by entry the same, since the weighted sum of m/p − 1 over the two is zero
        entry = tl.where(near, high * p_high * _phi(over_high) + low * p_low * _phi(over_low), entry)
        summand, infinite = entry, no_s & (no_s == 0)
        g = tl.where(p_s == 0.0, 0.0, p_s * (-one_minus_beta * tl.where(likelier, over_high, over_low)))
    bare = g
    if CLIP:  # the constants of the reverse KL's gradient, 1 and the drift, cancel but for the clipped entries
        clipped = p_s * (1.0 if KIND == FORWARD_KL else (drift - 1.0 if KIND == REVERSE_KL else 0.0))
        over = (entry > tau) | infinite
        g = tl.where(over, clipped, g)
        bare = tl.where(over, 0.0, -p_t) if KIND == FORWARD_KL else g
    return p_s, p_t, b_s, b_t, summand, entry, infinite, g, bare


@jit()
def _sums_tile(
    total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own,
    p_s, p_t, b_s, b_t, summand, entry, infinite, g, bare, tau,
    KIND: tl.constexpr, CLIP: tl.constexpr, LOSS: tl.constexpr, STATS: tl.constexpr, SUM_G: tl.constexpr,
):  # fmt: skip
    """Adds a tile's terms to the lanes: the loss and what the entry clip cut from it (LOSS), both entropies (STATS), g
    and p_S of all but a sure token, its g, and the two of the bare g (SUM_G)."""
    if LOSS:
        if CLIP:
            excess = tl.where(entry <= tau, 0.0, entry - tau)
            if KIND == JSD:
                cut += excess
                summand -= excess
            else:
                cut += tl.where(infinite, INF, excess)
                summand += tl.where(infinite, tau, -excess)
        elif KIND != JSD:
            summand = tl.where(infinite, INF, summand)
        total += summand
    if STATS:
        h_s -= tl.where(p_s == 0.0, 0.0, p_s * b_s)
        h_t -= tl.where(p_t == 0.0, 0.0, p_t * b_t)
    if SUM_G:
        sure = p_s > SURE
        rest += tl.where(sure, 0.0, g)
        p_rest += tl.where(sure, 0.0, p_s)
        own += tl.where(sure, g, 0.0)
        if CLIP and KIND == FORWARD_KL:
            bare_rest += tl.where(sure, 0.0, bare)
            bare_own += tl.where(sure, bare, 0.0)
    return total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own


@jit()
def _levelled(gradients, KIND: tl.constexpr, CLIP: tl.constexpr):
    """From sweep 2's sums, what sweep 3 knows: Σg of all but a sure token less its level, the level, above which p_S a
    token is sure, and whether g is the bare one."""
    rest, p_rest, own, bare_rest, bare_own = gradients
    sure = p_rest < SURE
    p_own = 1.0 - p_rest
    bare = sure & (sure == 0)
    if CLIP and KIND == FORWARD_KL:
        # a row without a sure token: what the clips leave of Σp_T is small beside the 1 that p_S sums to
        bare = tl.where(sure, -bare_own < 0.5 * p_own, -bare_rest < 0.5)
        rest, own = tl.where(bare, bare_rest, rest), tl.where(bare, bare_own, own)
    level = tl.where(sure, own / p_own, 0.0)
    return rest - level * p_rest, level, tl.where(sure, SURE, NEVER), bare


@jit()
def _sweep_tile(
    total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own,
    student, teacher, dz, start, end, offset, transform, norms, clips, known, weight, kept,
    KIND: tl.constexpr, CLIP: tl.constexpr, LOSS: tl.constexpr, STATS: tl.constexpr, SUM_G: tl.constexpr,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of sweep 2 (LOSS, STATS, SUM_G), 3 (dz is not None) or both; returns the lanes."""
    x_s, x_t = _load(student, start, end, BLOCK, MASKED), _load(teacher, start, end, BLOCK, MASKED)
    u_s, u_t, gap, slope = _pair(x_s, x_t, offset, transform, LINK, CAP_S, CAP_T)
    p_s, p_t, b_s, b_t, summand, entry, infinite, g, bare = _terms(u_s, u_t, gap, norms, clips, KIND, CLIP)
    total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own = _sums_tile(
        total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own,
        p_s, p_t, b_s, b_t, summand, entry, infinite, g, bare, clips[2], KIND, CLIP, LOSS, STATS, SUM_G,
    )  # fmt: skip
    if dz is not None:
        sum_g, level, sure, use_bare = known
        if CLIP and KIND == FORWARD_KL:
            g = tl.where(use_bare, bare, g)
        g = tl.where(p_s > sure, 0.0, g - p_s * level) - p_s * sum_g
        # 0 for a row without a gradient, whatever its terms
        _store(dz, start, end, tl.where(kept, g * slope * weight, 0.0), BLOCK, MASKED)
    return total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own


@jit()
def _sweep(
    student, teacher, dz, begin, end, offset, transform, norms, clips, known, weight, kept,
    KIND: tl.constexpr, CLIP: tl.constexpr, LOSS: tl.constexpr, STATS: tl.constexpr, SUM_G: tl.constexpr,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 2, 3 or both over columns [begin, end): sums of `_sums_tile`'s lanes, the entropies in bits."""
    zero = tl.zeros((BLOCK,), tl.float32)
    total, cut, h_s, h_t = zero, zero, zero, zero
    rest, p_rest, own, bare_rest, bare_own = zero, zero, zero, zero, zero
    start = begin
    while start + BLOCK <= end:
        total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own = _sweep_tile(
            total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own,
            student, teacher, dz, start, end, offset, transform, norms, clips, known, weight, kept,
            KIND, CLIP, LOSS, STATS, SUM_G, LINK, CAP_S, CAP_T, BLOCK, False,
        )  # fmt: skip
        start += BLOCK
    if start < end:
        total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own = _sweep_tile(
            total, cut, h_s, h_t, rest, p_rest, own, bare_rest, bare_own,
            student, teacher, dz, start, end, offset, transform, norms, clips, known, weight, kept,
            KIND, CLIP, LOSS, STATS, SUM_G, LINK, CAP_S, CAP_T, BLOCK, True,
        )  # fmt: skip
    losses, entropies, gradients = (0.0, 0.0), (0.0, 0.0), (0.0, 0.0, 0.0, 0.0, 0.0)
    if LOSS:
        losses = (tl.sum(total, 0), tl.sum(cut, 0))
    if STATS:
        entropies = (tl.sum(h_s, 0), tl.sum(h_t, 0))
    if SUM_G:
        gradients = (
            tl.sum(rest, 0), tl.sum(p_rest, 0), tl.sum(own, 0), tl.sum(bare_rest, 0), tl.sum(bare_own, 0)
        )  # fmt: skip
    return losses, entropies, gradients


@jit()
def _token(total, cut, live, token_clip):
    """Scalars of a row: loss, divergence, entry clipped, clipped amount, token clipped, whether it has a gradient."""
    divergence, amount, clipped = total + cut, cut, live & (cut > 0.0)  # without an entry clip, cut is 0
    loss = tl.where(live, total, 0.0)
    over = live & (loss > token_clip)
    kept = live & (loss != INF) & (over == 0)  # a row whose loss is NaN is kept: it must stay visible
    amount = tl.where(over, amount + (loss - token_clip), amount)
    loss = tl.where(over, token_clip, loss)
    return loss, tl.where(live, divergence, 0.0), clipped, tl.where(live, amount, 0.0), over, kept


@jit()
def _write_token(table, stride, loss, divergence, clipped, amount, over, h_s, h_t, STATS: tl.constexpr):
    """A row's entries of the table, but for the targets' log-probabilities."""
    tl.store(table, loss)
    if STATS:
        tl.store(table + stride, divergence)
        tl.store(table + 2 * stride, h_s * LN2)
        tl.store(table + 3 * stride, h_t * LN2)
        tl.store(table + 4 * stride, tl.where(clipped, 1.0, 0.0))
        tl.store(table + 5 * stride, amount)
        tl.store(table + 6 * stride, tl.where(over, 1.0, 0.0))


@jit()
def _write_logprobs(
    table, stride, target, student, teacher, columns, offset, transform, norms,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
):  # fmt: skip
    """Both models' log-probability of the row's target; NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < columns)
    x_s = tl.load(student + target, mask=inside, other=float("nan")).to(tl.float32)
    x_t = tl.load(teacher + target, mask=inside, other=float("nan")).to(tl.float32)
    u_s, u_t, _, _ = _pair(x_s, x_t, offset, transform, LINK, CAP_S, CAP_T)
    m_s, l_s, m_t, l_t, _ = norms
    tl.store(table + 7 * stride, (u_s - m_s) * transform[4] - l_s * LN2)
    tl.store(table + 8 * stride, (u_t - m_t) * transform[4] - l_t * LN2)


@jit("columns", "table_stride")
def divergence_kernel(
    student, teacher, dz, table, targets, row_scale, wanted, columns,
    student_stride, teacher_stride, dz_stride, table_stride, token_stride,
    transform, clips, grad_factor,
    KIND: tl.constexpr, CLIP: tl.constexpr, STATS: tl.constexpr,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, all sweeps. dz, targets and row_scale may be None; `wanted`: None, or 0 for rows to skip."""
    row = tl.program_id(0).to(tl.int64)
    if wanted is not None:  # noqa: SIM102 (one condition is for the compiler, the other for the device)
        if tl.load(wanted + row) == 0:
            return
    student += row * student_stride
    teacher += row * teacher_stride
    table += row * token_stride
    offset = _row_offset(student, teacher, None, columns, transform, LINK, CAP_S, CAP_T, BLOCK)
    top_s, sum_s, top_t, sum_t, top, sum_df, drift = _normalisers(
        student, teacher, None, 0, columns, offset, transform, KIND, LINK, CAP_S, CAP_T, BLOCK
    )
    norms, live = _settled(top_s, sum_s, top_t, sum_t, top, sum_df, transform)
    if targets is not None:
        _write_logprobs(
            table, table_stride, tl.load(targets + row), student, teacher, columns, offset, transform, norms,
            LINK, CAP_S, CAP_T,
        )  # fmt: skip
        tl.debug_barrier()  # all have read the target's logits before any writes dz in their place

    # the entropies' sums go where registers are free
    SUMS_FIRST: tl.constexpr = KIND == JSD or CLIP or dz is None
    kept = live
    sum_g = tl.where(live, drift / sum_s, 0.0) if KIND == REVERSE_KL else norms[4] * 0.0
    known = (sum_g, norms[4] * 0.0, norms[4] * 0.0 + NEVER, live & (live == 0))
    if SUMS_FIRST:
        losses, entropies, gradients = _sweep(
            student, teacher, None, 0, columns, offset, transform, norms, clips, known, 0.0, live,
            KIND, CLIP, True, STATS and dz is None, dz is not None, LINK, CAP_S, CAP_T, BLOCK,
        )  # fmt: skip
        loss, divergence, clipped, amount, over, kept = _token(losses[0], losses[1], live, clips[3])
        known = _levelled(gradients, KIND, CLIP)
    elif tl.minimum(sum_s, sum_t) < CERTAIN:  # one read more
        _, _, gradients = _sweep(
            student, teacher, None, 0, columns, offset, transform, norms, clips, known, 0.0, live,
            KIND, CLIP, False, False, True, LINK, CAP_S, CAP_T, BLOCK,
        )  # fmt: skip
        known = _levelled(gradients, KIND, CLIP)
    if dz is not None:
        dz += row * dz_stride
        weight = grad_factor
        if row_scale is not None:
            weight *= tl.load(row_scale + row).to(tl.float32)
        losses, entropies, _ = _sweep(
            student, teacher, dz, 0, columns, offset, transform, norms, clips, known, weight, kept,
            KIND, CLIP, not SUMS_FIRST, STATS, False, LINK, CAP_S, CAP_T, BLOCK,
        )  # fmt: skip
        if not SUMS_FIRST:
            loss, divergence, clipped, amount, over, kept = _token(losses[0], losses[1], live, clips[3])
            if live & (kept == 0):  # an infinite or clipped token, which only the whole row can tell: rare
                tl.debug_barrier()
                zero = tl.zeros((BLOCK,), tl.float32)
                start = 0
                while start < columns:
                    _store(dz, start, columns, zero, BLOCK, True)
                    start += BLOCK
    _write_token(table, table_stride, loss, divergence, clipped, amount, over, entropies[0], entropies[1], STATS)


# Rows split among programs: the same sweeps, a launch each.


@jit()
def _partial(scratch, row, splits, item, ITEMS: tl.constexpr, MAX: tl.constexpr):
    """One item of all of a row's programs, (MAX,), 0 where there is no program."""
    lane = tl.arange(0, MAX)
    return tl.load(scratch + (row * splits + lane) * ITEMS + item, mask=lane < splits, other=0.0)


@jit()
def _joined(scratch, row, splits, transform, ITEMS: tl.constexpr, MAX: tl.constexpr):
    """`_settled` of a whole row, and its offset, from what its programs left after sweep 1."""
    bits = transform[5]
    here = tl.arange(0, MAX) < splits
    top_s = tl.where(here, _partial(scratch, row, splits, 0, ITEMS, MAX), LOWEST)
    top_t = tl.where(here, _partial(scratch, row, splits, 2, ITEMS, MAX), LOWEST)
    top = tl.where(here, _partial(scratch, row, splits, 4, ITEMS, MAX), LOWEST)
    high_s, high_t, high = tl.max(top_s, 0), tl.max(top_t, 0), tl.max(top, 0)
    sum_s = tl.sum(_partial(scratch, row, splits, 1, ITEMS, MAX) * tl.exp2((top_s - high_s) * bits), 0)
    sum_t = tl.sum(_partial(scratch, row, splits, 3, ITEMS, MAX) * tl.exp2((top_t - high_t) * bits), 0)
    sum_df = tl.sum(_partial(scratch, row, splits, 5, ITEMS, MAX) * tl.exp2((top - high) * bits), 0)
    norms, live = _settled(high_s, sum_s, high_t, sum_t, high, sum_df, transform)
    return norms, live, tl.load(scratch + row * splits * ITEMS + 6)


@jit("columns", "tiles", "splits")
def split_normalisers_kernel(
    student, teacher, absent, sweep, columns, tiles, splits, student_stride, teacher_stride, transform,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 1 of columns [i·tiles·BLOCK, (i + 1)·tiles·BLOCK) of a row into `sweep`, (n, splits, ITEMS).

    `absent`: None, or a bit for each column, dense, set where it takes no part.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student += row * student_stride
    teacher += row * teacher_stride
    if absent is not None:
        absent += row * tl.cdiv(columns, 32)
    offset = _row_offset(student, teacher, absent, columns, transform, LINK, CAP_S, CAP_T, BLOCK)
    begin = part * tiles * BLOCK
    top_s, sum_s, top_t, sum_t, top, sum_df, _ = _normalisers(
        student, teacher, absent, begin, tl.minimum(begin + tiles * BLOCK, columns), offset, transform,
        JSD, LINK, CAP_S, CAP_T, BLOCK,
    )  # fmt: skip
    sweep += (row * splits + part) * ITEMS
    tl.store(sweep, top_s)
    tl.store(sweep + 1, sum_s)
    tl.store(sweep + 2, top_t)
    tl.store(sweep + 3, sum_t)
    tl.store(sweep + 4, top)
    tl.store(sweep + 5, sum_df)
    tl.store(sweep + 6, offset)


@jit("columns", "tiles", "splits", "table_stride")
def split_sums_kernel(
    student, teacher, table, targets, sweep, sums, columns, tiles, splits,
    student_stride, teacher_stride, table_stride, token_stride, transform, clips,
    KIND: tl.constexpr, CLIP: tl.constexpr, STATS: tl.constexpr,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    ITEMS: tl.constexpr, SUM_ITEMS: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 2 of a part of a row into `sums`, (n, splits, SUM_ITEMS); the first part writes the log-probabilities."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    student += row * student_stride
    teacher += row * teacher_stride
    norms, live, offset = _joined(sweep, row, splits, transform, ITEMS, MAX)
    begin = part * tiles * BLOCK
    losses, entropies, gradients = _sweep(
        student, teacher, None, begin, tl.minimum(begin + tiles * BLOCK, columns), offset, transform, norms, clips,
        (0.0, 0.0, NEVER, False), 0.0, live, KIND, CLIP, True, STATS, True, LINK, CAP_S, CAP_T, BLOCK,
    )  # fmt: skip
    sums += (row * splits + part) * SUM_ITEMS
    tl.store(sums, losses[0])
    tl.store(sums + 1, losses[1])
    tl.store(sums + 2, entropies[0])
    tl.store(sums + 3, entropies[1])
    tl.store(sums + 4, gradients[0])
    tl.store(sums + 5, gradients[1])
    tl.store(sums + 6, gradients[2])
    tl.store(sums + 7, gradients[3])
    tl.store(sums + 8, gradients[4])
    # one condition is for the compiler, the other for the device
    if targets is not None:  # noqa: SIM102
        if part == 0:
            _write_logprobs(
                table + row * token_stride, table_stride, tl.load(targets + row), student, teacher, columns, offset,
                transform, norms, LINK, CAP_S, CAP_T,
            )  # fmt: skip


@jit("columns", "tiles", "splits", "table_stride")
def split_gradient_kernel(
    student, teacher, dz, table, row_scale, sweep, sums, columns, tiles, splits,
    student_stride, teacher_stride, dz_stride, table_stride, token_stride, transform, clips, grad_factor,
    KIND: tl.constexpr, CLIP: tl.constexpr, STATS: tl.constexpr,
    LINK: tl.constexpr, CAP_S: tl.constexpr, CAP_T: tl.constexpr,
    ITEMS: tl.constexpr, SUM_ITEMS: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sweep 3 of a part of a row; the first part writes the table. Reads no column but its own: dz may be `student`."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    norms, live, offset = _joined(sweep, row, splits, transform, ITEMS, MAX)
    total = tl.sum(_partial(sums, row, splits, 0, SUM_ITEMS, MAX), 0)
    cut = tl.sum(_partial(sums, row, splits, 1, SUM_ITEMS, MAX), 0)
    loss, divergence, clipped, amount, over, kept = _token(total, cut, live, clips[3])
    if part == 0:
        h_s = tl.sum(_partial(sums, row, splits, 2, SUM_ITEMS, MAX), 0)
        h_t = tl.sum(_partial(sums, row, splits, 3, SUM_ITEMS, MAX), 0)
        table += row * token_stride
        _write_token(table, table_stride, loss, divergence, clipped, amount, over, h_s, h_t, STATS)
    if dz is not None:
        student += row * student_stride
        teacher += row * teacher_stride
        dz += row * dz_stride
        weight = grad_factor
        if row_scale is not None:
            weight *= tl.load(row_scale + row).to(tl.float32)
        gradients = (
            tl.sum(_partial(sums, row, splits, 4, SUM_ITEMS, MAX), 0),
            tl.sum(_partial(sums, row, splits, 5, SUM_ITEMS, MAX), 0),
            tl.sum(_partial(sums, row, splits, 6, SUM_ITEMS, MAX), 0),
            tl.sum(_partial(sums, row, splits, 7, SUM_ITEMS, MAX), 0),
            tl.sum(_partial(sums, row, splits, 8, SUM_ITEMS, MAX), 0),
        )
        known = _levelled(gradients, KIND, CLIP)
        begin = part * tiles * BLOCK
        _sweep(
            student, teacher, dz, begin, tl.minimum(begin + tiles * BLOCK, columns), offset, transform, norms, clips,
            known, weight, kept, KIND, CLIP, False, False, False, LINK, CAP_S, CAP_T, BLOCK,
        )  # fmt: skip


# Outside of a support: sweep 1 above, and these.


@jit("splits")
def outside_kernel(sweep, log_sums, splits, transform, ITEMS: tl.constexpr, MAX: tl.constexpr):
    """log Z_S, log Z_T and their difference, in two parts, from `sweep` into `log_sums`, (n, 4); −inf: no mass."""
    row = tl.program_id(0).to(tl.int64)
    norms, _, offset = _joined(sweep, row, splits, transform, ITEMS, MAX)
    m_s, l_s, m_t, l_t, drift = norms
    nats = transform[4]
    no_s = tl.sum(_partial(sweep, row, splits, 1, ITEMS, MAX), 0) == 0.0
    no_t = tl.sum(_partial(sweep, row, splits, 3, ITEMS, MAX), 0) == 0.0
    log_s = tl.where(no_s, NEG_INF, (m_s + offset) * nats + l_s * LN2)
    log_t = tl.where(no_t, NEG_INF, m_t * nats + l_t * LN2)
    log_sums += row * 4
    tl.store(log_sums, log_s)
    tl.store(log_sums + 1, log_t)
    tl.store(log_sums + 2, tl.where(no_s | no_t, log_s - log_t, drift))
    tl.store(log_sums + 3, offset * nats)


@jit()
def _tail_gradient_tile(
    logits, dz, start, end, shift, weight, inner, outer, CAP: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    y, _, slope = _own(_load(logits, start, end, BLOCK, MASKED), inner, outer, CAP)
    value = tl.exp2((y - shift) * LOG2E) * slope * weight
    _store(dz, start, end, tl.where(weight == 0.0, 0.0, value), BLOCK, MASKED)


@jit("columns", "tiles")
def tail_gradient_kernel(
    logits, dz, shifts, weights, columns, tiles, stride, dz_stride, transform, grad_factor,
    CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = weight·exp(y − shift)·dy/dlogits over columns [i·tiles·BLOCK, (i + 1)·tiles·BLOCK) of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits += row * stride
    dz += row * dz_stride
    shift, weight = tl.load(shifts + row), tl.load(weights + row) * grad_factor
    inner, outer = transform
    start = part * tiles * BLOCK
    end = tl.minimum(start + tiles * BLOCK, columns)
    while start + BLOCK <= end:
        _tail_gradient_tile(logits, dz, start, end, shift, weight, inner, outer, CAP, BLOCK, False)
        start += BLOCK
    if start < end:
        _tail_gradient_tile(logits, dz, start, end, shift, weight, inner, outer, CAP, BLOCK, True)


# One model alone.


@jit()
def _single_tile(
    m, s, logits, start, end, inner, outer, bits, CAP: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    u, _, _ = _own(_load(logits, start, end, BLOCK, MASKED), inner, outer, CAP)
    above, ratio = _grown(u, m, bits)
    return tl.where(above, u, m), tl.where(above, s * ratio + 1.0, s + ratio)


@jit()
def _single_gradient_tile(
    entropy, logits, dz, start, end, target, inner, outer, bits, top, log_total, weight,
    ENTROPY: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    u, _, slope = _own(_load(logits, start, end, BLOCK, MASKED), inner, outer, CAP)
    log_p = (u - top) * bits - log_total
    p = tl.exp2(log_p)
    if ENTROPY:
        entropy -= tl.where(p == 0.0, 0.0, p * log_p)
    if dz is not None:
        hit = tl.where(start + tl.arange(0, BLOCK) == target, 1.0, 0.0)
        _store(dz, start, end, (hit - p) * slope * weight, BLOCK, MASKED)
    return entropy


@jit("columns", "table_stride")
def logprob_kernel(
    logits, dz, table, targets, row_scale, columns, stride, dz_stride, table_stride, token_stride,
    transform, grad_factor, ENTROPY: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log p(target), the entropy and d log p(target) / d logits, one program per row. dz and row_scale may be None."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    table += row * token_stride
    inner, outer, bits = transform
    zero = tl.zeros((BLOCK,), tl.float32)
    m, s = zero + LOWEST, zero
    start = 0
    while start + BLOCK <= columns:
        m, s = _single_tile(m, s, logits, start, columns, inner, outer, bits, CAP, BLOCK, False)
        start += BLOCK
    if start < columns:
        m, s = _single_tile(m, s, logits, start, columns, inner, outer, bits, CAP, BLOCK, True)
    top = tl.max(m, 0)
    total = tl.sum(s * tl.exp2((m - top) * bits), 0)
    dead = total == 0.0
    top, log_total = tl.where(dead, 0.0, top), tl.where(dead, 0.0, tl.log2(total))

    target = tl.load(targets + row)
    inside = (target >= 0) & (target < columns)
    x = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    u_target, _, _ = _own(x, inner, outer, CAP)
    logprob = ((u_target - top) * bits - log_total) * LN2
    tl.debug_barrier()  # as in `divergence_kernel`
    tl.store(table, logprob)
    if ENTROPY or dz is not None:
        weight = grad_factor
        if dz is not None:
            dz += row * dz_stride
            if row_scale is not None:
                weight *= tl.load(row_scale + row).to(tl.float32)
        weight = tl.where(logprob == NEG_INF, 0.0, weight)
        entropy = zero
        start = 0
        while start + BLOCK <= columns:
            entropy = _single_gradient_tile(
                entropy, logits, dz, start, columns, target, inner, outer, bits, top, log_total, weight,
                ENTROPY, CAP, BLOCK, False,
            )  # fmt: skip
            start += BLOCK
        if start < columns:
            entropy = _single_gradient_tile(
                entropy, logits, dz, start, columns, target, inner, outer, bits, top, log_total, weight,
                ENTROPY, CAP, BLOCK, True,
            )  # fmt: skip
        if ENTROPY:
            tl.store(table + table_stride, tl.sum(entropy, 0) * LN2)
