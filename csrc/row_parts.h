// A row of logits in parts: what each part knows of it, how parts are joined, and what follows for an entry. For the
// cluster kernel and, to be tested without a device, for the host.
//
// A row goes through two sums over all of its parts. The first gives both models' normalisers: each part reports a
// `Part`, and `merged` is associative up to rounding, so any tree will do. The second adds up `Totals`. In between,
// `settled` turns the whole row's Part into what `measure` needs for an entry; after, `gradient` needs no exponential.
//
// Both normalisers are summed apart from each other, which leaves an error of about 1e-6 in log Z_S - log Z_T, the same
// for the whole row. The gradient loses it, for dz = g - p_S sum(g); the divergence takes its square, which is nothing
// beside the square of a gap of 1e-3. It would be something where the models agree on a token that has nearly all the
// probability: there, such a token, the row's top, is kept apart from the sums. The rest then gives
// log Z_S - log Z_T - (the gap at the top) to 1e-6 of itself, and itself is as small as the rest.
#pragma once

#include "requests.h"
#include "row_math.h"

namespace opsd {

// Below every logit that counts; finite, so that the difference of two is no NaN, also in bits.
constexpr float LOWEST_LOGIT = -1e30f;

// ------------------------------------------------------------------------------------------------------ logits as used

// y = outer tanh(inner raw), or outer raw.
struct Curve32 {
    float inner, outer;
    bool capped;
};

struct Tempering {
    Curve32 student, teacher;
    bool same_cap;
    float unlike;      // without caps: the student's factor less the teacher's
    float nats, bits;  // a difference of y's in these units: the raw logits' common factor, or 1 where y is tempered
};

struct Logits {
    float y_s, y_t;
    float gap;            // y_S - y_T less the centre, as well as it is known; in a KL y_S = y_T where neither has any
    float slope;          // d y_S / d raw, of the cap alone
};

template <class M>
OPSD_HD float tempered(float raw, const Curve32& curve, Tanh<float>& tanh) {
    if (!curve.capped) return raw * curve.outer;
    tanh = tanh_of<float, M>(raw * curve.inner);
    return raw == -INF ? raw : tanh.value * curve.outer;  // masking outlives the cap
}

// centre: of the gaps. Where the models differ by a constant, the digits of a gap are those of raw_s - centre - raw_t.
template <int BETA, bool TRANSFORMED>
OPSD_HD Logits logits_of(float raw_s, float raw_t, const Tempering& how, float centre = 0.0f) {
    if constexpr (!TRANSFORMED) {
        // the generalised JSD multiplies whatever comes of two infinities by 0
        const float gap = (raw_s - centre) - raw_t;
        return {raw_s, raw_t, BETA != MIXTURE && raw_s == raw_t ? -centre : gap, 1.0f};
    }
    Tanh<float> tanh_s{}, tanh_t{};
    Logits x;
    x.y_s = tempered<Fast>(raw_s, how.student, tanh_s);
    x.y_t = tempered<Fast>(raw_t, how.teacher, tanh_t);
    x.slope = how.student.capped ? tanh_s.derivative<Fast>() : 1.0f;
    const float apart = raw_s - raw_t, rounded = x.y_s == x.y_t ? 0.0f : x.y_s - x.y_t;
    const bool infinite = x.y_s == -INF || x.y_t == -INF;
    x.gap = rounded;
    if (how.same_cap && !infinite) {
        const float inner = how.student.inner;
        x.gap = how.student.outer * tanh_difference<float, Fast>(
            raw_s * inner, raw_t * inner, apart * inner, tanh_s, tanh_t
        );
    } else if (!how.student.capped && !how.teacher.capped && !infinite) {
        x.gap = apart * how.student.outer + raw_t * how.unlike;
    }
    x.gap -= centre;
    return x;
}

// --------------------------------------------------------------------------------------------------------- normalisers

// The largest y so far, and the sum of 2^((y - high) bits) with it.
struct Running {
    float high = LOWEST_LOGIT, sum = 0;

    template <int N>
    OPSD_HD void add(const float (&y)[N], float bits) {
        static_assert((N & (N - 1)) == 0, "halved until one is left");
        float lanes[N];
        OPSD_UNROLL
        for (int i = 0; i < N; ++i) lanes[i] = y[i];
        OPSD_UNROLL
        for (int half = N / 2; half; half /= 2) {
            OPSD_UNROLL
            for (int i = 0; i < half; ++i) lanes[i] = larger(lanes[i], lanes[i + half]);
        }
        const float best = larger(high, lanes[0]), shift = best * bits;
        OPSD_UNROLL
        for (int i = 0; i < N; ++i) lanes[i] = exp2_fast(y[i] * bits - shift);
        OPSD_UNROLL
        for (int half = N / 2; half; half /= 2) {
            OPSD_UNROLL
            for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        }
        sum = sum * exp2_fast((high - best) * bits) + lanes[0];
        high = best;
    }
    OPSD_HD float scaled_to(float other, float bits) const { return sum * exp2_fast((high - other) * bits); }
};

// What a part knows of its row. Without a top (-1), the largest entry of the student is within rest_s.
struct Part {
    float high_s = LOWEST_LOGIT, rest_s = 0;  // the largest y_S; the sum of 2^((y_S - high_s) bits), without the top
    float high_t = LOWEST_LOGIT, rest_t = 0;  // the largest y_T; likewise, also without the student's top
    float at_top = -INF, gap_at_top = 0;      // y_T and the gap there
    int32_t top = -1;                         // the column of the student's largest entry

    OPSD_HD bool has_top() const { return top >= 0; }
};

// Whether a part's largest entry must be its top: only such a one can have half of a row's probability.
OPSD_HD bool wants_top(const Part& whole) { return whole.high_s > LOWEST_LOGIT && whole.rest_s < 2.0f; }

// An entry that is not the top, for sums that were begun again without it.
OPSD_HD void add_rest(Part& part, float y_s, float y_t, float bits) {
    part.rest_s += exp2_fast(y_s * bits - part.high_s * bits);
    part.rest_t += exp2_fast(y_t * bits - part.high_t * bits);
}

OPSD_HD Part merged(const Part& x, const Part& y, float bits) {
    const bool first = x.high_s > y.high_s || (x.high_s == y.high_s && uint32_t(x.top) <= uint32_t(y.top));
    // field by field: a reference to one of the two would need both in memory
    const auto either = [first](auto yes, auto no) { return first ? yes : no; };
    Part out, other;
    out.high_s = either(x.high_s, y.high_s), other.high_s = either(y.high_s, x.high_s);
    out.rest_s = either(x.rest_s, y.rest_s), other.rest_s = either(y.rest_s, x.rest_s);
    out.at_top = either(x.at_top, y.at_top), other.at_top = either(y.at_top, x.at_top);
    out.top = either(x.top, y.top), other.top = either(y.top, x.top);
    out.gap_at_top = either(x.gap_at_top, y.gap_at_top);
    out.high_t = larger(x.high_t, y.high_t);
    const float own = exp2_fast((other.high_s - out.high_s) * bits);
    out.rest_s += (other.rest_s + (other.has_top() ? 1.0f : 0.0f)) * own;
    out.rest_t = x.rest_t * exp2_fast((x.high_t - out.high_t) * bits) +
                 y.rest_t * exp2_fast((y.high_t - out.high_t) * bits);
    if (other.has_top()) out.rest_t += exp2_fast((other.at_top - out.high_t) * bits);
    return out;
}

// A whole row. log2 p = y bits - log; d = (the gap less the centre) nats - slip.
struct Norms {
    float log_s = 0, log_t = 0, centre = 0, slip = 0;
    bool no_s = false, no_t = false;  // a model has no mass anywhere
    Level level;
    int32_t top = -1;  // of a level that is sure: the column whose g it takes away

    OPSD_HD bool live() const { return !no_s && !no_t; }
};

struct Measure {
    Weights weights;
    float entry_clip;  // nats; infinity: none
};

// A request's numbers as the entries need them.
struct RowMeaning {
    bool transformed;  // a cap, or two scales: y is not the raw logit
    Tempering tempering;
    Measure measure;
};

inline RowMeaning meaning_of(const DivergenceRequest& r) {
    const Transform &s = r.student_transform, &t = r.teacher_transform;
    const auto curve = [&](const Transform& of) -> Curve32 {
        const bool capped = of.softcap > 0;
        const double outer = (capped ? of.softcap : of.scale) / r.temperature;
        return {capped ? float(of.scale / of.softcap) : 0.0f, float(outer), capped};
    };
    const bool transformed = s.softcap > 0 || t.softcap > 0 || s.scale != t.scale;
    const bool same_cap = s.softcap > 0 && s.softcap == t.softcap && s.scale == t.scale;
    const double nats = transformed ? 1.0 : s.scale / r.temperature;
    return {
        transformed,
        {curve(s), curve(t), same_cap, float((s.scale - t.scale) / r.temperature), float(nats),
         float(nats * 1.4426950408889634)},
        {{float(r.beta), float(1 - r.beta)}, float(r.entry_clip)}
    };
}

template <int BETA, bool CLIP, bool TRANSFORMED>
OPSD_HD Norms settled(const Part& row, const Tempering& how, const Measure& measure) {
    // y_s - y_t, of two logits that need not be one column's, less the centre
    const auto apart = [](float y_s, float y_t, float centre) { return (y_s - centre) - y_t; };
    constexpr float WIDE = 60.0f;  // bits
    const float bits = how.bits;
    Norms out;
    const float reach = (row.high_t - row.at_top) * bits;  // infinite without a top
    const float at_top = row.has_top() ? exp2_fast(-reach) : 0.0f, z_s = row.rest_s + (row.has_top() ? 1.0f : 0.0f);
    const float z_t = row.rest_t + at_top;
    out.no_s = z_s == 0.0f;
    out.no_t = z_t == 0.0f;
    if (!out.live()) {
        if (!out.no_s) out.log_s = row.high_s * bits + log2f(z_s);
        if (!out.no_t) out.log_t = row.high_t * bits + log2f(z_t);
        return out;
    }
    float d_top;
    if (row.has_top() && reach <= WIDE) {
        const float rest_t = row.rest_t * exp2_fast(reach), more = (row.rest_s - rest_t) / (1.0f + rest_t);
        const bool near = (more < 0.0f ? -more : more) < 0.5f;
        out.slip = near ? log1pf(more) : logf((1.0f + row.rest_s) / (1.0f + rest_t));
        out.centre = row.gap_at_top;
        d_top = -out.slip;
        if (!TRANSFORMED) out.slip += apart(row.high_s, row.at_top, out.centre) * how.nats;  // its rounding
        out.log_s = row.high_s * bits + log1pf(row.rest_s) * LOG2E;
        out.log_t = row.at_top * bits + log1pf(rest_t) * LOG2E;
    } else {
        out.centre = row.high_s - row.high_t;
        out.slip = logf(z_s / z_t) + apart(row.high_s, row.high_t, out.centre) * how.nats;
        out.log_s = row.high_s * bits + log2f(z_s);
        out.log_t = row.high_t * bits + log2f(z_t);
        d_top = row.at_top == -INF ? INF : (row.gap_at_top - out.centre) * how.nats - out.slip;
    }
    if (row.has_top()) {
        // p_T as `measured` has it: the level must be the other entries' too
        const float p_s = 1.0f / z_s, small = p_s * exp2_fast(smaller(d_top, FAR) * -LOG2E);
        const float p_t = d_top > 0.0f ? small : exp2_fast(row.at_top * bits - out.log_t);
        out.level = level_at<BETA, CLIP, Fast>(p_s, p_t, d_top, measure.weights, measure.entry_clip);
        if (out.level.sure) out.top = row.top;
    }
    return out;
}

// ------------------------------------------------------------------------------------------------------------- entries

// Sums over a row, entropies in bits.
struct Totals {
    enum Which { TERM, DIRECTION, INFINITE, AMOUNT, OVER, ENTROPY_S, ENTROPY_T, COUNT };
    float sum[COUNT] = {};

    template <int BETA, bool CLIP, bool STATISTICS>
    static OPSD_HD constexpr bool used(int which) {
        return which == INFINITE ? BETA != MIXTURE
             : which == AMOUNT || which == OVER ? CLIP
             : which == ENTROPY_S || which == ENTROPY_T ? STATISTICS
                                                        : true;
    }
};

// Of an entry: dz = g weight - p centre.
struct Direction {
    float g, p;
};

template <int BETA, bool CLIP, bool STATISTICS>
OPSD_HD Direction measured(
    const Logits& x, const Norms& norms, const Tempering& how, const Measure& measure, Totals& totals
) {
    const float d = x.gap * how.nats - norms.slip;
    const float log_s = x.y_s * how.bits - norms.log_s, log_t = x.y_t * how.bits - norms.log_t;
    const float big = exp2_fast(greatest(log_s, log_t));
    const Entry<float> e = entry<BETA, true, float, Fast>(d, big, measure.weights);
    totals.sum[Totals::TERM] += e.term;
    if (BETA != MIXTURE) totals.sum[Totals::INFINITE] += is_infinite<BETA>(d) ? 1.0f : 0.0f;
    bool over = false;
    if constexpr (CLIP) {
        const Clipped<float> cut = clipped<BETA>(e, d, measure.entry_clip);
        over = cut.over;
        totals.sum[Totals::AMOUNT] += cut.amount;
        totals.sum[Totals::OVER] += over ? 1.0f : 0.0f;
    }
    if constexpr (STATISTICS) {  // 0 where p is: a finite logarithm
        totals.sum[Totals::ENTROPY_S] -= e.p_s * larger(log_s, -2.0f * FAR);
        totals.sum[Totals::ENTROPY_T] -= e.p_t * larger(log_t, -2.0f * FAR);
    }
    const float g = levelled<BETA, CLIP>(e, over, norms.level);
    totals.sum[Totals::DIRECTION] += g;
    return {g * x.slope, e.p_s * x.slope};
}

OPSD_HD float gradient(Direction of, float weight, float centre) { return of.g * weight - of.p * centre; }

// A row's token, from its totals; a row in which a model has no mass contributes nothing.
template <bool CLIP>
OPSD_HD Token<float> token_of_row(const Totals& totals, const Norms& norms, const Measure& measure, float token_clip) {
    if (!norms.live()) return {0.0f, 0.0f, 0.0f, false, false};
    return token_of(
        totals.sum[Totals::TERM], totals.sum[Totals::AMOUNT], totals.sum[Totals::INFINITE],
        CLIP ? measure.entry_clip : INF, token_clip
    );
}

// --------------------------------------------------------------------------------------------------------------- parts

// Quads, four columns each, of which the last may be part of one; workers in order take as many each.
struct Slice {
    int32_t first, count;
};

OPSD_HD int32_t quads_of(int64_t vocab) { return int32_t((vocab + 3) / 4); }
OPSD_HD int32_t quads_per_worker(int64_t vocab, int32_t workers) { return (quads_of(vocab) + workers - 1) / workers; }
OPSD_HD Slice slice_of(int64_t vocab, int32_t workers, int32_t worker) {
    const int32_t each = quads_per_worker(vocab, workers), first = worker * each, left = quads_of(vocab) - first;
    return {first, left < 0 ? 0 : left < each ? left : each};
}

}  // namespace opsd
