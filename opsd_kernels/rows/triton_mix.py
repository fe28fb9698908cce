"""The rows of a mixed target from the products of its parts, each read once or twice: the device's side.

A part's product x becomes y = transform(x + bias_factor·bias) / temperature. The first `LINEAR` parts are summed, each
times its factor; what the others are, `KIND` tells. See `mixture` for the formulas.

1. `mix_sums_kernel`, only where a normaliser or a mean is needed before an entry can be known: it reads the parts
   that are normalised or averaged, online.
2. `mix_kernel` reads every part and writes the target over the first. A thread writes what it has read itself.

Rows of float32 that are read and written, for a chunk's (n, V), with one linear part and one other: a centred residual
1 + 2 + 1, a difference and two arithmetic parts 2 + 2 + 1, a sum of two linear ones 2 + 1. In torch those were 10,
about 26, about 19 and 3 or more: an operation reads its operands and writes its result. The divergence of the target
then reads student and target twice and writes dz, in the student's place where it is float32.

Few rows are split among several programs: each leaves two numbers for each part in `sums`, (n, splits, parts, 2).
"""

from __future__ import annotations

from ..triton_jit import LN2, LOG2E, constant, jit, tl
from .triton_careful import LOWEST, NEG_INF, _grown, _load, _own, _store, _tanh

KINDS = ("none", "residual", "centred", "difference", "arithmetic")  # what the parts are that are not linear
NONE, RESIDUAL, CENTRED, DIFFERENCE, ARITHMETIC = map(constant, range(5))
FIELDS = constant(4)  # of a part's constants: factor, bias_factor, and what is inside and outside a tanh


@jit()
def _tempered(
    part, bias, numbers, start, end, BIASED: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    """A tile of y; −inf where the bias is, and in columns from `end` on."""
    _, bias_factor, inner, outer = numbers
    x = _load(part, start, end, BLOCK, MASKED)
    if BIASED:
        b = _load(bias, start, end, BLOCK, MASKED)
        x = tl.where(b == NEG_INF, NEG_INF, x + b * bias_factor)
    y, _, _ = _own(x, inner, outer, CAP)
    return y


@jit()
def _numbers(constants, PART: tl.constexpr):
    constants += PART * FIELDS
    return tl.load(constants), tl.load(constants + 1), tl.load(constants + 2), tl.load(constants + 3)


@jit()
def _part(parts, part_stride, PART: tl.constexpr):
    return parts + tl.full((), PART, tl.int64) * part_stride


@jit()
def _grow(m, s, y):
    """An online log-sum-exp, m + log s, of each lane, met by y."""
    above, ratio = _grown(y, m, LOG2E)
    return tl.where(above, y, m), tl.where(above, s * ratio + 1.0, s + ratio)


@jit()
def _keep(sums, m, s):
    """Stores what `_normaliser` joins: the lanes' maximum, and their sum relative to it."""
    top = tl.max(m, 0)
    tl.store(sums, top)
    tl.store(sums + 1, tl.sum(s * tl.exp2((m - top) * LOG2E), 0))


@jit()
def _joined(sums, splits, PARTS: tl.constexpr, MAX: tl.constexpr):
    """A part's two numbers of each program of the row: (MAX,) each, a maximum's start and 0 where there is none."""
    split = tl.arange(0, MAX)
    there, at = split < splits, sums + split * (2 * PARTS)
    return tl.load(at, mask=there, other=LOWEST), tl.load(at + 1, mask=there, other=0.0), there


@jit()
def _normaliser(sums, splits, PARTS: tl.constexpr, MAX: tl.constexpr):
    m, s, _ = _joined(sums, splits, PARTS, MAX)
    top = tl.max(m, 0)
    return top + tl.log2(tl.sum(s * tl.exp2((m - top) * LOG2E), 0)) * LN2


@jit()
def _counted(biases, start, end, columns, LINEAR: tl.constexpr, BIASES: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns of a tile have a token: those before `end` where no linear part's bias is −inf."""
    inside = start + tl.arange(0, BLOCK) < end
    for i in tl.static_range(LINEAR):
        if (BIASES >> i) & 1:
            inside = inside & (_load(biases + i * columns, start, end, BLOCK, True) != NEG_INF)
    return inside


@jit("columns", "tiles")
def mix_sums_kernel(
    parts, biases, constants, sums, columns, tiles, part_stride, row_stride,
    PARTS: tl.constexpr, LINEAR: tl.constexpr, KIND: tl.constexpr, CAPS: tl.constexpr, BIASES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each part that is not linear: its log-sum-exp, or (CENTRED) its sum over the counted columns and their number.
    DIFFERENCE: the log-sum-exp of the linear part, and that of its sum with the other."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts += row * row_stride
    constants += row * (PARTS * FIELDS)
    sums += (row * tl.num_programs(1) + split) * (2 * PARTS)
    begin = split * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, columns)
    zero = tl.zeros((BLOCK,), tl.float32)
    if KIND == DIFFERENCE:
        first, other = _numbers(constants, 0), _numbers(constants, 1)
        part, bias = _part(parts, part_stride, 1), biases + columns
        m, s, both_m, both_s = zero + LOWEST, zero, zero + LOWEST, zero
        start = begin
        while start + BLOCK <= end:
            y = _tempered(parts, biases, first, start, end, BIASES & 1, CAPS & 1, BLOCK, False)
            more = _tempered(part, bias, other, start, end, (BIASES >> 1) & 1, (CAPS >> 1) & 1, BLOCK, False)
            m, s = _grow(m, s, y)
            both_m, both_s = _grow(both_m, both_s, y + tl.where(y == NEG_INF, 0.0, more))
            start += BLOCK
        if start < end:
            y = _tempered(parts, biases, first, start, end, BIASES & 1, CAPS & 1, BLOCK, True)
            more = _tempered(part, bias, other, start, end, (BIASES >> 1) & 1, (CAPS >> 1) & 1, BLOCK, True)
            m, s = _grow(m, s, y)
            both_m, both_s = _grow(both_m, both_s, y + tl.where(y == NEG_INF, 0.0, more))
        _keep(sums, m, s)
        _keep(sums + 2, both_m, both_s)
    else:
        for i in tl.static_range(LINEAR, PARTS):
            numbers = _numbers(constants, i)
            part, bias = _part(parts, part_stride, i), biases + i * columns
            m, s = zero + LOWEST, zero
            if KIND == CENTRED:
                m = zero
            start = begin
            while start + BLOCK <= end:
                y = _tempered(part, bias, numbers, start, end, (BIASES >> i) & 1, (CAPS >> i) & 1, BLOCK, False)
                if KIND == CENTRED:
                    counted = _counted(biases, start, end, columns, LINEAR, BIASES, BLOCK)
                    m += tl.where(counted & (y != NEG_INF), y, 0.0)
                    s += tl.where(counted, 1.0, 0.0)
                else:
                    m, s = _grow(m, s, y)
                start += BLOCK
            if start < end:
                y = _tempered(part, bias, numbers, start, end, (BIASES >> i) & 1, (CAPS >> i) & 1, BLOCK, True)
                if KIND == CENTRED:
                    counted = _counted(biases, start, end, columns, LINEAR, BIASES, BLOCK)
                    m += tl.where(counted & (y != NEG_INF), y, 0.0)
                    s += tl.where(counted, 1.0, 0.0)
                else:
                    m, s = _grow(m, s, y)
            if KIND == CENTRED:
                tl.store(sums + 2 * i, tl.sum(m, 0))
                tl.store(sums + 2 * i + 1, tl.sum(s, 0))
            else:
                _keep(sums + 2 * i, m, s)


@jit()
def _mixed_tile(
    parts, biases, every, norms, columns, start, end, part_stride, scale, bound,
    PARTS: tl.constexpr, LINEAR: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, CAPS: tl.constexpr,
    BIASES: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of the target's logits at temperature 1."""
    zero = tl.zeros((BLOCK,), tl.float32)
    target, residual = zero, zero
    for i in tl.static_range(PARTS):
        numbers = every[i]
        y = _tempered(
            _part(parts, part_stride, i), biases + i * columns, numbers, start, end,
            (BIASES >> i) & 1, (CAPS >> i) & 1, BLOCK, MASKED,
        )  # fmt: skip
        none, factor = y == NEG_INF, numbers[0]
        if i < LINEAR:
            target += tl.where(none, NEG_INF, y * factor)
        elif KIND == ARITHMETIC:
            log_p = tl.where(none, NEG_INF, y - norms[i] + tl.log(factor))
            if i == 0:
                target = log_p
            else:
                high = tl.maximum(target, log_p)
                both = high + tl.log(1.0 + tl.exp2(tl.abs(target - log_p) * -LOG2E))
                target = tl.where((target == NEG_INF) & (log_p == NEG_INF), NEG_INF, both)
        elif KIND == RESIDUAL:
            residual += tl.where(none, 0.0, (y - norms[i]) * factor)
        elif KIND == CENTRED:
            residual += tl.where(none, 0.0, y * factor)
        else:
            residual = tl.where(target == NEG_INF, 0.0, y) - norms[i]
    if (KIND != NONE) & (KIND != ARITHMETIC):
        if KIND == CENTRED:
            residual -= norms[0]
        if SMOOTH:
            tanh, _ = _tanh(residual / bound)
            residual = tanh * bound
        else:  # selected, so that NaN stays
            residual = tl.where(residual > bound, bound, tl.where(residual < -bound, -bound, residual))
        target += residual * scale
    return target


@jit("columns", "tiles", "splits")
def mix_kernel(
    parts, biases, constants, sums, columns, tiles, splits, part_stride, row_stride, scale, bound, temperature,
    PARTS: tl.constexpr, LINEAR: tl.constexpr, KIND: tl.constexpr, SMOOTH: tl.constexpr, CAPS: tl.constexpr,
    BIASES: tl.constexpr, MAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the target, times `temperature`, over the first part. `sums`: what the other kernel left."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts += row * row_stride
    constants += row * (PARTS * FIELDS)
    every = (_numbers(constants, 0),)
    for i in tl.static_range(1, PARTS):
        every = every + (_numbers(constants, i),)  # type: ignore[assignment]  # noqa: RUF005 - Triton unpacks no tuple
    norms = (0.0,)
    if KIND != NONE:
        sums += row * splits * (2 * PARTS)
        if KIND == CENTRED:
            mean = 0.0
            for i in tl.static_range(LINEAR, PARTS):
                total, count, there = _joined(sums + 2 * i, splits, PARTS, MAX)
                total = tl.sum(tl.where(there, total, 0.0), 0)
                mean += every[i][0] * total / tl.maximum(tl.sum(count, 0), 1.0)
            norms = (mean,)
        elif KIND == DIFFERENCE:
            before, both = _normaliser(sums, splits, PARTS, MAX), _normaliser(sums + 2, splits, PARTS, MAX)
            norms = (0.0, both - before)  # type: ignore[assignment]
        else:
            norms = (0.0 if LINEAR > 0 else _normaliser(sums, splits, PARTS, MAX),)
            for i in tl.static_range(1, PARTS):
                norm = 0.0 if i < LINEAR else _normaliser(sums + 2 * i, splits, PARTS, MAX)
                norms = norms + (norm,)  # type: ignore[assignment]  # noqa: RUF005
    begin = split * tiles * BLOCK
    end = tl.minimum(begin + tiles * BLOCK, columns)
    start = begin
    while start + BLOCK <= end:
        target = _mixed_tile(
            parts, biases, every, norms, columns, start, end, part_stride, scale, bound,
            PARTS, LINEAR, KIND, SMOOTH, CAPS, BIASES, BLOCK, False,
        )  # fmt: skip
        _store(parts, start, end, target * temperature, BLOCK, False)
        start += BLOCK
    if start < end:
        target = _mixed_tile(
            parts, biases, every, norms, columns, start, end, part_stride, scale, bound,
            PARTS, LINEAR, KIND, SMOOTH, CAPS, BIASES, BLOCK, True,
        )  # fmt: skip
        _store(parts, start, end, target * temperature, BLOCK, True)
