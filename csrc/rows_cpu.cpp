// The row pass on a CPU, float32: plain C entry points, vectorised by GCC/Clang vector extensions, parallel over rows.
//
// Sweeps over a pair of rows:
//   1. maxima, so that no exponential overflows and nothing is ever rescaled;
//   2. normalisers: Z_T, and Z_S - Z_T summed from its own small terms, so that c = log Z_S - log Z_T is as accurate as
//      the gap between the models is small, and d = log p_S - log p_T with it;
//   3. the divergence and the statistics. For the KLs without an entry clip sum(g) is known from 2 (0 for the forward
//      one, sum p_S d for the reverse), so dz = g - p_S sum(g) is written here;
//   4. otherwise g and p_S were left behind by 3, and are combined now, without another exponential.
// Only the first reads memory if a pair of rows fits the cache. Sums are in lanes, and in double beyond BLOCK entries.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "requests.h"
#include "threads.h"
#include "vectors.h"

namespace opsd {

constexpr int64_t BLOCK = 64 * LANES;
constexpr double DOUBLE_INF = std::numeric_limits<double>::infinity();
constexpr double DOUBLE_NAN = std::numeric_limits<double>::quiet_NaN();

// The last entries of a row, filled up with entries that contribute nothing.
static inline Vec load_part(const float* from, int64_t count, float fill) {
    float lanes[LANES];
    for (int64_t i = 0; i < LANES; ++i) lanes[i] = i < count ? from[i] : fill;
    return load(lanes);
}
static inline void store_part(float* to, Vec x, int64_t count) { memcpy(to, &x, size_t(count) * sizeof(float)); }

static inline float max_lane(Vec x) {
    float y = x[0];
    for (int i = 1; i < LANES; ++i) y = x[i] > y ? x[i] : y;
    return y;
}

static inline bool all_set(VecI mask) {
    int64_t halves[BYTES / 8], all = -1;
    memcpy(halves, &mask, sizeof(mask));
    for (const int64_t half : halves) all &= half;
    return all == -1;
}

// Sums of COUNT quantities over a row.
template <int COUNT>
struct Sums {
    VecD total[COUNT];
    Vec lanes[COUNT];
    Sums() {
        for (int i = 0; i < COUNT; ++i) total[i] = VecD{}, lanes[i] = Vec{};
    }
    void end_block() {
        for (int i = 0; i < COUNT; ++i) {
            total[i] += __builtin_convertvector(lanes[i], VecD);
            lanes[i] = Vec{};
        }
    }
    double operator[](int which) const {
        double sum = 0;
        for (int i = 0; i < LANES; ++i) sum += total[which][i];
        return sum;
    }
};

using Whole = std::integral_constant<int64_t, LANES>;

// Calls body(start, count) for each vector of a row and end_block() every BLOCK. A whole vector's count is of a type of
// its own, so that it costs nothing.
template <class Body, class End>
static inline __attribute__((always_inline)) void sweep(int64_t vocab, Body body, End end_block) {
    const int64_t whole = vocab - vocab % LANES;
    for (int64_t start = 0; start < whole; start += BLOCK) {
        const int64_t stop = start + BLOCK < whole ? start + BLOCK : whole;
        for (int64_t i = start; i < stop; i += LANES) body(i, Whole());
        end_block();
    }
    if (whole < vocab) {
        body(whole, vocab - whole);
        end_block();
    }
}

static inline Vec take(const float* from, Whole, float) { return load(from); }
static inline Vec take(const float* from, int64_t count, float fill) { return load_part(from, count, fill); }
static inline void put(float* to, Vec x, Whole) { store(to, x); }
static inline void put(float* to, Vec x, int64_t count) { store_part(to, x, count); }

// ---------------------------------------------------------------------------------------------------------- requests
// The divergence's is in requests.h.

struct LogprobRequest {
    const float* logits;
    const int64_t* targets;
    const float* row_scale;  // or null
    float* table;
    void* dz;  // or null
    int64_t n, vocab;
    int64_t logits_stride, dz_stride, table_stride;
    double temperature;
    Transform transform;
    int32_t dz_type, want_entropy, threads;
};

struct TopKRequest {
    const float* logits;
    float* logprobs;  // (n, k), dense; or null: the ids alone are wanted
    int64_t* ids;     // (n, k), dense
    float* log_sums;  // (n,)
    int64_t n, vocab, k, logits_stride;
    double temperature;
    Transform transform;
    int32_t threads;
};

// The rest of both models' mass, where the entries at `ids` are taken away.
struct OutsideRequest {
    const float* student;
    const float* teacher;  // or null: the student's alone
    const int64_t* ids;    // (n, k), dense
    double* log_sums_s;    // (n,)
    double* log_sums_t;    // (n,), or null with the teacher
    double* differences;   // (n,), log_sums_s - log_sums_t; or null with the teacher
    int64_t n, vocab, k;
    int64_t student_stride, teacher_stride;
    double temperature;
    Transform student_transform, teacher_transform;
    int32_t threads;
};

// dz = weight exp(y - shift) dy / dx, where y is x through the transform.
struct TailGradientRequest {
    const float* logits;
    const float* shift;   // (n,)
    const float* weight;  // (n,)
    void* dz;
    int64_t n, vocab;
    int64_t logits_stride, dz_stride;
    double temperature;
    Transform transform;
    int32_t dz_type, threads;
};

// ------------------------------------------------------------------------------------------------------ rows of a kind

// A thread's rows of intermediates, made when first asked for.
struct Scratch {
    enum Which { STUDENT, TEACHER, DIFFERENCE, DERIVATIVE, PROBABILITY, GRADIENT, COUNT };
    explicit Scratch(int64_t vocab) : vocab(vocab) {}
    float* row(Which which) {
        if (!rows[which]) rows[which].reset(new float[size_t(vocab)]);
        return rows[which].get();
    }
    int64_t vocab;
    std::unique_ptr<float[]> rows[COUNT];
};

// y = softcap tanh(scale raw / softcap) / T, or scale raw / T.
struct Curve {
    bool capped;
    double exact_outer;
    float inner, outer;
    Curve(Transform transform, double temperature)
        : capped(transform.softcap > 0),
          exact_outer((capped ? transform.softcap : transform.scale) / temperature),
          inner(capped ? float(transform.scale / transform.softcap) : 0.0f),
          outer(float(exact_outer)) {}
};

// derivative: of the cap, or null.
static void transform_row(const float* raw, float* out, float* derivative, int64_t vocab, const Curve& curve) {
    sweep(
        vocab,
        [&](int64_t i, auto count) {
            const Vec x = take(raw + i, count, 0.0f);
            Vec y = x;
            if (curve.capped) {
                const Tanh<Vec> tanh = tanh_of<Vec>(x * curve.inner);
                y = tanh.value;
                if (derivative) put(derivative + i, tanh.derivative(), count);
            }
            put(out + i, x == -INF ? x : y * curve.outer, count);  // masking outlives the cap
        },
        [] {});
}

// y_S - y_T, without the rounding of either where both models have a cap of one shape, or neither has one.
static void transformed_difference(
    const float* student, const float* teacher, const float* y_s, const float* y_t, float* out, int64_t vocab,
    const Curve& curve_s, const Curve& curve_t
) {
    const bool same_cap =
        curve_s.capped && curve_t.capped && curve_s.inner == curve_t.inner && curve_s.outer == curve_t.outer;
    const bool both_plain = !curve_s.capped && !curve_t.capped;
    const float unlike = float(curve_s.exact_outer - curve_t.exact_outer);
    sweep(
        vocab,
        [&](int64_t i, auto count) {
            const Vec s = take(y_s + i, count, 0.0f), t = take(y_t + i, count, 0.0f);
            const Vec rounded = s == t ? Vec{} : s - t;  // both -inf: nothing there, and no NaN
            Vec difference = rounded;
            if (same_cap || both_plain) {
                const Vec raw_s = take(student + i, count, 0.0f), raw_t = take(teacher + i, count, 0.0f);
                const Vec apart = raw_s - raw_t;
                if (same_cap) {
                    const Vec a = raw_s * curve_s.inner, b = raw_t * curve_s.inner;
                    difference = curve_s.outer * tanh_difference<Vec>(
                        a, b, apart * curve_s.inner, tanh_of<Vec>(a), tanh_of<Vec>(b)
                    );
                } else {
                    difference = apart * curve_s.outer + raw_t * unlike;
                }
                difference = (s == -INF) | (t == -INF) ? rounded : difference;
            }
            put(out + i, difference, count);
        },
        [] {});
}

static VecHalf narrowed(VecU x) { return __builtin_convertvector(x, VecHalf); }

// To nearest, ties to even; NaN stays NaN.
static VecHalf to_bfloat16(Vec x) {
    const VecU u = bits_as<VecU>(x);
    const VecU rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return narrowed(x == x ? rounded : VecU{} + 0x7fc0u);
}
static VecHalf to_float16(Vec x) {
    const VecU u = bits_as<VecU>(x), sign = (u >> 16) & 0x8000u, size = u & 0x7fffffffu;
    // subnormal results: adding 1/2 puts their last bit at the last of the float's
    const VecU small = bits_as<VecU>(bits_as<Vec>(size) + 0.5f) - 0x3f000000u;
    const VecU normal = (size - 0x38000000u + 0x0fffu + ((size >> 13) & 1u)) >> 13;
    const VecU huge = VecU{} + 0x7c00u;
    VecU out = size < 0x38800000u ? small : normal;
    out = size >= 0x477ff000u ? huge : out;
    out = x == x ? out : VecU{} + 0x7e00u;
    return narrowed(out | sign);
}

struct Output {
    void* row;
    int32_t type;
    float* as_float() const { return type == FLOAT32 ? static_cast<float*>(row) : nullptr; }
};

static inline void put(Output to, int64_t i, Vec x, int64_t count) {
    if (to.type == FLOAT32) {
        float* out = static_cast<float*>(to.row) + i;
        count == LANES ? store(out, x) : store_part(out, x, count);
    } else {
        const VecHalf half = to.type == BFLOAT16 ? to_bfloat16(x) : to_float16(x);
        memcpy(static_cast<uint16_t*>(to.row) + i, &half, size_t(count) * sizeof(uint16_t));
    }
}

static Output output_row(void* dz, int32_t type, int64_t element) {
    return {static_cast<char*>(dz) + element * (type == FLOAT32 ? 4 : 2), type};
}
static void fill(Output out, int64_t vocab, float value) {
    sweep(vocab, [&](int64_t i, auto count) { put(out, i, splat<Vec>(value), count); }, [] {});
}

// out = (g - p centre) factor, times the cap's derivative if there is one.
static void combine(
    Output out, const float* g, const float* p, const float* derivative, int64_t vocab, float centre, float factor
) {
    sweep(
        vocab,
        [&](int64_t i, auto count) {
            Vec x = take(g + i, count, 0.0f);
            if (p) x -= take(p + i, count, 0.0f) * centre;
            x *= factor;
            if (derivative) x *= take(derivative + i, count, 0.0f);
            put(out, i, x, count);
        },
        [] {});
}

// A shift close to the row's maximum, whose difference with the other row's is exact in float32.
static float shift_of(float maximum) {
    const float grid = 4096.0f;
    return std::fabs(maximum) < 2048.0f ? std::nearbyint(maximum * grid) / grid : maximum;
}

static float maximum(const float* x, int64_t vocab) {
    Vec best[4];
    for (Vec& b : best) b = splat<Vec>(-INF);
    int64_t i = 0;
    for (; i + 4 * LANES <= vocab; i += 4 * LANES)
        for (int j = 0; j < 4; ++j) {
            const Vec y = load(x + i + j * LANES);
            best[j] = y > best[j] ? y : best[j];
        }
    for (const Vec& b : best) best[0] = b > best[0] ? b : best[0];
    float highest = max_lane(best[0]);
    for (; i < vocab; ++i) highest = x[i] > highest ? x[i] : highest;
    return highest;
}
// The first element that is the largest; 0 where none is above -inf.
static int64_t index_of_maximum(const float* x, int64_t vocab) {
    float highest = -INF;
    int64_t block = 0;
    constexpr int64_t STEP = 4 * BLOCK;
    for (int64_t start = 0; start < vocab; start += STEP) {
        const float here = maximum(x + start, std::min(STEP, vocab - start));
        if (here > highest) highest = here, block = start;
    }
    if (highest == -INF) return 0;
    while (x[block] != highest) ++block;
    return block;
}
static bool has_nan(const float* x, int64_t vocab) {
    for (int64_t i = 0; i < vocab; ++i)
        if (x[i] != x[i]) return true;
    return false;
}

// x log-probabilities up to a constant; -inf becomes a number whose exponential is 0, so that p x is 0.
static inline Vec countable(Vec x) { return x < -FAR ? splat<Vec>(-FAR) : x; }

// One distribution. y = factor x; log p = y - shift - log_sum.
struct Distribution {
    double shift = 0, log_sum = 0, entropy = 0;
    bool empty = false;  // -inf everywhere: probabilities 0, log-normaliser 0
    bool broken() const { return empty && log_sum != 0; }  // of NaN, and nothing else above -inf
    double log_normaliser() const { return empty && !broken() ? -DOUBLE_INF : shift + log_sum; }
    double log_prob(const float* x, float factor, int64_t target) const {
        return double(x[target]) * factor - shift - log_sum;
    }
};

static Distribution distribution(const float* x, float factor, int64_t vocab) {
    Distribution out;
    const float highest = maximum(x, vocab);
    if (highest == -INF) {
        out.empty = true;
        if (has_nan(x, vocab)) out.log_sum = out.entropy = DOUBLE_NAN;
        return out;
    }
    const float shift = shift_of(highest * factor);
    Sums<2> sums;
    sweep(
        vocab,
        [&](int64_t i, auto count) {
            const Vec y = take(x + i, count, -INF) * factor - shift;
            const Vec e = exp_below<Vec>(y);
            sums.lanes[0] += e;
            sums.lanes[1] += e * countable(y);
        },
        [&] { sums.end_block(); });
    out.shift = shift;
    out.log_sum = std::log(sums[0]);
    out.entropy = out.log_sum - sums[1] / sums[0];
    return out;
}

// -------------------------------------------------------------------------------------------------------- divergences

// One row of a request: y = factor x in both models from here on. Its top is the student's likeliest entry: gaps are
// measured from the top's, which then has none. So where it has nearly all the probability, and the models differ in
// little else, that little has all its digits.
struct Pair {
    const float* student;
    const float* teacher;
    const float* difference;  // y_S - y_T where it is known better than from x, or null
    int64_t vocab;
    float factor;
    int64_t top;
    float shift_s, shift_t, shift_gap;
    float unlevel;           // shift_s - shift_t - shift_gap: 0, or the teacher's logit of the top less its largest
    float scale_s, scale_t;  // p = exp(y - shift) scale
    float centre_gap;        // d = (y_S - y_T) - shift_gap - centre_gap
    double log_sum_s, log_sum_t;
    double mean_gap;  // sum(p_S u), where it is asked for
    const float* next_student;  // the rows that this thread comes to next, to be fetched meanwhile
    const float* next_teacher;
};

struct Vectors {
    Vec x_s, x_t, u;  // y - shift, and the gap from the top's
};
template <class Count>
static inline __attribute__((always_inline)) Vectors vectors(const Pair& row, int64_t i, Count count) {
    const Vec s = take(row.student + i, count, -INF), t = take(row.teacher + i, count, -INF);
    Vec difference;
    if (row.difference) difference = take(row.difference + i, count, 0.0f);
    else difference = (s == t ? Vec{} : s - t) * row.factor;  // both -inf: nothing there, and no NaN
    return {s * row.factor - row.shift_s, t * row.factor - row.shift_t, difference - row.shift_gap};
}

// A gap, 0 where the student has no such entry: its p_S is 0.
static inline Vec present(Vec u) { return u == -INF ? Vec{} : u; }

template <bool MEAN_GAP>
static void normalise(Pair& row) {
    Sums<4> sums;
    sweep(
        row.vocab,
        [&](int64_t i, auto count) {
            const Vectors v = vectors(row, i, count);
            const Vec apart = v.u - row.unlevel;  // x_s - x_t
            const auto student_larger = apart > 0.0f;
            const Vec big = exp_below<Vec>(student_larger ? v.x_s : v.x_t);
            const Gap<Vec> g = gap<Vec>(apart);
            const Vec small = big * g.e, e_s = student_larger ? big : small;
            sums.lanes[0] += e_s;
            sums.lanes[1] += student_larger ? small : big;
            sums.lanes[2] += big * (student_larger ? -g.t : g.t);
            if (MEAN_GAP) sums.lanes[3] += e_s * present(v.u);
        },
        [&] { sums.end_block(); });
    const double z_s = sums[0], z_t = sums[1], more = sums[2] / z_t;
    row.centre_gap = float((std::fabs(more) < 0.5 ? std::log1p(more) : std::log(z_s / z_t)) + row.unlevel);
    row.log_sum_t = std::log(z_t);
    row.log_sum_s = std::log(z_s);
    row.scale_s = float(1.0 / z_s);
    row.scale_t = float(1.0 / z_t);
    row.mean_gap = sums[3] / z_s;
}

struct Totals {
    double divergence = 0, direction = 0, over = 0, amount = 0, infinite = 0, entropy_s = 0, entropy_t = 0;
};

struct Measure {
    Weights weights;
    float entry_clip;
};

template <int BETA, bool CLIP>
static Level level_of(const Pair& row, const Measure& how) {
    const float x_t = row.teacher[row.top] * row.factor - row.shift_t, d = x_t == -INF ? INF : -row.centre_gap;
    return level_at<BETA, CLIP>(row.scale_s, exp_below<float>(x_t) * row.scale_t, d, how.weights, how.entry_clip);
}

// DIRECT (a KL without an entry clip): out = dz by `factor`. Else out = g less its level, and p_S goes into
// `probability`.
template <int BETA, bool CLIP, bool STATISTICS, bool GRAD>
static Totals measure(const Pair& row, const Measure& how, float* out, float* probability, float factor) {
    constexpr bool DIRECT = BETA != MIXTURE && !CLIP;
    enum { TERM, INFINITE, ENTROPY_S, ENTROPY_T, DIRECTION, AMOUNT, OVER, COUNT };
    Sums<COUNT> sums;
    const float mean_gap = float(row.mean_gap);
    const Level level = GRAD && !DIRECT ? level_of<BETA, CLIP>(row, how) : Level();
    sweep(
        row.vocab,
        [&](int64_t i, auto count) {
            __builtin_prefetch(row.next_student + i, 0, 2);  // memory rests while this sweep computes
            __builtin_prefetch(row.next_teacher + i, 0, 2);
            const Vectors v = vectors(row, i, count);
            const Vec d = v.u - row.centre_gap;
            const auto student_larger = d > 0.0f;
            const Vec big = exp_below<Vec>(student_larger ? v.x_s : v.x_t) *
                            (student_larger ? splat<Vec>(row.scale_s) : splat<Vec>(row.scale_t));
            const Entry<Vec> e = entry<BETA, GRAD, Vec>(d, big, how.weights);
            sums.lanes[TERM] += e.term;
            const Vec one = splat<Vec>(1.0f);
            if (BETA != MIXTURE) sums.lanes[INFINITE] += is_infinite<BETA>(d) ? one : Vec{};
            VecI over{};
            if (CLIP) {
                const Clipped<Vec> cut = clipped<BETA>(e, d, how.entry_clip);
                over = cut.over;
                sums.lanes[AMOUNT] += cut.amount;
                sums.lanes[OVER] += over ? one : Vec{};
            }
            if (STATISTICS) {
                sums.lanes[ENTROPY_S] += e.p_s * countable(v.x_s);
                sums.lanes[ENTROPY_T] += e.p_t * countable(v.x_t);
            }
            if (GRAD && DIRECT) {
                put(out + i, (BETA == FORWARD ? e.g : e.p_s * (present(v.u) - mean_gap)) * factor, count);
            } else if (GRAD) {
                const Vec g = levelled<BETA, CLIP>(e, over, level);
                sums.lanes[DIRECTION] += g;
                put(out + i, g, count);
                put(probability + i, e.p_s, count);
            }
        },
        [&] { sums.end_block(); });
    Totals totals;
    totals.divergence = sums[TERM];
    totals.infinite = sums[INFINITE];
    totals.direction = sums[DIRECTION];
    if (GRAD && !DIRECT && level.sure) {  // what rounding has left of it
        totals.direction -= out[row.top];
        out[row.top] *= 0.0f;  // but not of NaN
    }
    totals.amount = sums[AMOUNT];
    totals.over = sums[OVER];
    totals.entropy_s = row.log_sum_s - sums[ENTROPY_S];
    totals.entropy_t = row.log_sum_t - sums[ENTROPY_T];
    return totals;
}

using MeasureRow = Totals (*)(const Pair&, const Measure&, float*, float*, float);

template <int BETA, bool CLIP>
static MeasureRow choose_flags(bool statistics, bool grad) {
    if (statistics) return grad ? measure<BETA, CLIP, true, true> : measure<BETA, CLIP, true, false>;
    return grad ? measure<BETA, CLIP, false, true> : measure<BETA, CLIP, false, false>;
}
static MeasureRow choose(int beta, bool clip, bool statistics, bool grad) {
    if (beta == FORWARD) return (clip ? choose_flags<FORWARD, true> : choose_flags<FORWARD, false>)(statistics, grad);
    if (beta == REVERSE) return (clip ? choose_flags<REVERSE, true> : choose_flags<REVERSE, false>)(statistics, grad);
    return (clip ? choose_flags<MIXTURE, true> : choose_flags<MIXTURE, false>)(statistics, grad);
}

// What brings both models' rows to one factor: a cap, or two different scales, and they are transformed, in scratch.
struct Curves {
    Curve s, t;
    bool needed;
    float factor;
    Curves(Transform student, Transform teacher, double temperature)
        : s(student, temperature),
          t(teacher, temperature),
          needed(s.capped || t.capped || student.scale != teacher.scale),
          factor(needed ? 1.0f : float(student.scale / temperature)) {}

    // The derivative of the student's cap goes to `slope`, unless that is null.
    Pair rows(const float* student, const float* teacher, int64_t vocab, Scratch& scratch, float* slope) const {
        Pair row{};
        row.student = student, row.teacher = teacher;
        row.vocab = vocab, row.factor = factor;
        if (!needed) return row;
        float* y_s = scratch.row(Scratch::STUDENT);
        float* y_t = scratch.row(Scratch::TEACHER);
        float* apart = scratch.row(Scratch::DIFFERENCE);
        transform_row(student, y_s, slope, vocab, s);
        transform_row(teacher, y_t, nullptr, vocab, t);
        transformed_difference(student, teacher, y_s, y_t, apart, vocab, s, t);
        row.student = y_s, row.teacher = y_t, row.difference = apart;
        return row;
    }
};

// Whether both rows give a distribution; if so, how far their entries are shifted.
static bool shifted(Pair& row) {
    row.top = index_of_maximum(row.student, row.vocab);
    const float likeliest = row.student[row.top], max_t = maximum(row.teacher, row.vocab) * row.factor;
    if (!(likeliest > -INF) || max_t == -INF) return false;
    row.shift_s = likeliest * row.factor;
    const float at_top = row.teacher[row.top] * row.factor;
    if (at_top > -INF) {
        const float gap = row.difference ? row.difference[row.top] : (likeliest - row.teacher[row.top]) * row.factor;
        const bool near = max_t - at_top <= 1.0f;  // as exp_below would have it
        row.shift_t = near ? at_top : max_t;
        row.shift_gap = gap;
        row.unlevel = near ? 0.0f : row.shift_s - row.shift_t - gap;
    } else {
        row.shift_t = max_t, row.shift_gap = row.shift_s - max_t, row.unlevel = 0.0f;
    }
    return true;
}

class DivergenceRows {
public:
    explicit DivergenceRows(const DivergenceRequest& request)
        : r(request),
          beta(r.beta == 0 ? FORWARD : r.beta == 1 ? REVERSE : MIXTURE),
          clip(r.entry_clip < DOUBLE_INF),
          curves(r.student_transform, r.teacher_transform, r.temperature),
          how{{float(r.beta), float(1 - r.beta)}, float(r.entry_clip)},
          measure_row(choose(beta, clip, r.statistics != 0, r.dz != nullptr)) {}

    void operator()(int64_t index, int64_t next, Scratch& scratch) const {
        float* derivative = curves.s.capped && r.dz ? scratch.row(Scratch::DERIVATIVE) : nullptr;
        Pair row = curves.rows(
            r.student + index * r.student_stride, r.teacher + index * r.teacher_stride, r.vocab, scratch, derivative
        );
        const float* student = row.student;
        const float* teacher = row.teacher;
        const float factor = row.factor;
        float* column = r.table + index;
        const auto set = [&](Column which, double value) { column[which * r.table_stride] = float(value); };
        const Output dz = r.dz ? output_row(r.dz, r.dz_type, index * r.dz_stride) : Output{nullptr, FLOAT32};

        if (!shifted(row)) {  // one of them gives no distribution: nothing to compare
            const Distribution p_s = distribution(student, factor, r.vocab);
            const Distribution p_t = distribution(teacher, factor, r.vocab);
            const double nothing = p_s.broken() || p_t.broken() ? DOUBLE_NAN : 0.0;
            set(LOSS, nothing);
            if (r.statistics) {
                for (Column which : {DIVERGENCE, CLIPPED_AMOUNT}) set(which, nothing);
                for (Column which : {ENTRY_CLIPPED, TOKEN_CLIPPED}) set(which, 0);
                set(STUDENT_ENTROPY, p_s.entropy);
                set(TEACHER_ENTROPY, p_t.entropy);
                if (r.targets) {
                    set(STUDENT_LOGPROB, p_s.log_prob(student, factor, r.targets[index]));
                    set(TEACHER_LOGPROB, p_t.log_prob(teacher, factor, r.targets[index]));
                }
            }
            if (r.dz) fill(dz, r.vocab, float(nothing));
            return;
        }

        row.next_student = r.student + next * r.student_stride, row.next_teacher = r.teacher + next * r.teacher_stride;
        const bool direct = beta != MIXTURE && !clip;
        if (direct && beta == REVERSE && r.dz) normalise<true>(row);
        else normalise<false>(row);

        if (r.statistics && r.targets) {  // before dz overwrites the logits
            const int64_t target = r.targets[index];
            set(STUDENT_LOGPROB, double(student[target]) * factor - row.shift_s - row.log_sum_s);
            set(TEACHER_LOGPROB, double(teacher[target]) * factor - row.shift_t - row.log_sum_t);
        }
        const float weight = r.row_scale ? r.row_scale[index] : 1.0f;
        const float chain = float(r.student_transform.scale / r.temperature) * weight;
        float* out = nullptr;
        if (r.dz) out = dz.as_float() ? dz.as_float() : scratch.row(Scratch::GRADIENT);
        float* probability = r.dz && !direct ? scratch.row(Scratch::PROBABILITY) : nullptr;
        const Totals totals = measure_row(row, how, out, probability, chain);

        const Token<double> token =
            token_of(totals.divergence, totals.amount, totals.infinite, r.entry_clip, r.token_clip);
        set(LOSS, token.loss);
        if (r.statistics) {
            set(DIVERGENCE, token.divergence);
            set(STUDENT_ENTROPY, totals.entropy_s);
            set(TEACHER_ENTROPY, totals.entropy_t);
            set(ENTRY_CLIPPED, totals.over > 0);
            set(CLIPPED_AMOUNT, token.amount);
            set(TOKEN_CLIPPED, token.over);
        }
        if (!r.dz) return;
        if (!token.kept) fill(dz, r.vocab, 0.0f);
        else if (!direct || derivative || !dz.as_float())
            combine(dz, out, probability, derivative, r.vocab, float(totals.direction), direct ? 1.0f : chain);
    }

private:
    const DivergenceRequest& r;
    int beta;
    bool clip;
    Curves curves;
    Measure how;
    MeasureRow measure_row;
};

// -------------------------------------------------------------------------------------------------- log-probabilities

static void logprob_row(const LogprobRequest& r, int64_t index, Scratch& scratch) {
    const float* x = r.logits + index * r.logits_stride;
    float factor = float(r.transform.scale / r.temperature);
    const float chain = factor * (r.row_scale ? r.row_scale[index] : 1.0f);
    const float* derivative = nullptr;
    if (r.transform.softcap > 0) {
        float* y = scratch.row(Scratch::STUDENT);
        float* slope = r.dz ? scratch.row(Scratch::DERIVATIVE) : nullptr;
        transform_row(x, y, slope, r.vocab, Curve(r.transform, r.temperature));
        x = y, derivative = slope, factor = 1.0f;
    }
    const int64_t target = r.targets[index];
    const Distribution p = distribution(x, factor, r.vocab);
    const double logprob = p.log_prob(x, factor, target);
    r.table[index] = float(logprob);
    if (r.want_entropy) r.table[r.table_stride + index] = float(p.entropy);
    if (!r.dz) return;
    const Output dz = output_row(r.dz, r.dz_type, index * r.dz_stride);
    if (logprob == -DOUBLE_INF) return fill(dz, r.vocab, 0.0f);
    float* g = dz.as_float() ? dz.as_float() : scratch.row(Scratch::GRADIENT);
    const float scale = float(std::exp(-p.log_sum)), shift = float(p.shift), at_target = x[target] * factor - shift;
    sweep(
        r.vocab,
        [&](int64_t i, auto count) {
            put(g + i, exp_below<Vec>(take(x + i, count, -INF) * factor - shift) * -scale, count);
        },
        [] {});
    g[target] = -std::expm1(at_target - float(p.log_sum));
    combine(dz, g, nullptr, derivative, r.vocab, 0.0f, chain);
}

// --------------------------------------------------------------------------------------------------- likeliest tokens

struct Candidate {
    float x;
    int64_t id;
    bool operator<(const Candidate& other) const { return x > other.x || (x == other.x && id < other.id); }
};

// A number that at least k of x exceed: just below the k-th largest of the maxima of disjoint parts.
static float exceeded(const float* x, int64_t vocab, int64_t k) {
    const int64_t group = 4 * LANES, part = std::max(vocab / (8 * k) / group, int64_t(1)) * group;
    std::vector<float> maxima;
    for (int64_t i = 0; i + part <= vocab; i += part) maxima.push_back(maximum(x + i, part));
    if (int64_t(maxima.size()) < k) return -INF;
    std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
    return std::nextafter(maxima[size_t(k - 1)], -INF);
}

// The k largest of x, largest first, of equal ones those with the smaller ids; -inf if there are not k. NaN counts as
// infinity: what comes of it must stay visible. What exceeds the k-th largest so far is collected, and the collection
// cut to k whenever it is twice that.
static std::vector<Candidate> largest(const float* x, int64_t vocab, int64_t k) {
    std::vector<Candidate> found;
    const size_t keep = size_t(k), room = 2 * keep + 64;
    found.reserve(room);
    float least = exceeded(x, vocab, k);
    const auto offer = [&](int64_t i) {
        if (x[i] <= least) return;
        if (found.size() == room) {
            std::nth_element(found.begin(), found.begin() + (k - 1), found.end());
            found.resize(keep);
            least = found.back().x;
            if (x[i] <= least) return;
        }
        found.push_back({x[i] == x[i] ? x[i] : INF, i});
    };
    int64_t i = 0;
    for (; i + 4 * LANES <= vocab; i += 4 * LANES) {
        VecI below[4];
        for (int j = 0; j < 4; ++j) below[j] = load(x + i + j * LANES) <= least;
        if (all_set(below[0] & below[1] & below[2] & below[3])) continue;
        for (int j = 0; j < 4; ++j)
            if (!all_set(below[j]))
                for (int64_t lane = 0; lane < LANES; ++lane) offer(i + j * LANES + lane);
    }
    for (; i < vocab; ++i) offer(i);
    for (i = 0; i < vocab && found.size() < keep; ++i)  // too few above -inf
        if (x[i] == -INF) found.push_back({-INF, i});
    std::partial_sort(found.begin(), found.begin() + k, found.end());
    found.resize(keep);
    return found;
}

static void top_k_row(const TopKRequest& r, int64_t index, Scratch& scratch) {
    const float* x = r.logits + index * r.logits_stride;
    float factor = float(r.transform.scale / r.temperature);
    const std::vector<Candidate> best = largest(x, r.vocab, r.k);
    for (int64_t i = 0; i < r.k; ++i) r.ids[index * r.k + i] = best[size_t(i)].id;
    if (!r.logprobs) return;
    if (r.transform.softcap > 0) {
        float* y = scratch.row(Scratch::STUDENT);
        transform_row(x, y, nullptr, r.vocab, Curve(r.transform, r.temperature));
        x = y, factor = 1.0f;
    }
    const Distribution p = distribution(x, factor, r.vocab);
    r.log_sums[index] = float(p.log_normaliser());
    for (int64_t i = 0; i < r.k; ++i)
        r.logprobs[index * r.k + i] = float(p.log_prob(x, factor, best[size_t(i)].id));
}

// ------------------------------------------------------------------------------------------------ outside of a support

// A copy of a row without the entries at `ids`.
static const float* without(const float* x, const int64_t* ids, int64_t k, float* copy, int64_t vocab) {
    memcpy(copy, x, size_t(vocab) * sizeof(float));
    for (int64_t i = 0; i < k; ++i) copy[ids[i]] = -INF;
    return copy;
}

static void outside_row(const OutsideRequest& r, const Curves& curves, int64_t index, Scratch& scratch) {
    const int64_t* ids = r.ids + index * r.k;
    const float* student =
        without(r.student + index * r.student_stride, ids, r.k, scratch.row(Scratch::GRADIENT), r.vocab);
    if (!r.teacher) {
        const Curve& curve = curves.s;
        if (curve.capped) {
            transform_row(student, scratch.row(Scratch::STUDENT), nullptr, r.vocab, curve);
            student = scratch.row(Scratch::STUDENT);
        }
        const float factor = curve.capped ? 1.0f : curve.outer;
        r.log_sums_s[index] = distribution(student, factor, r.vocab).log_normaliser();
        return;
    }
    const float* teacher =
        without(r.teacher + index * r.teacher_stride, ids, r.k, scratch.row(Scratch::PROBABILITY), r.vocab);
    Pair row = curves.rows(student, teacher, r.vocab, scratch, nullptr);
    if (shifted(row)) {
        normalise<false>(row);
        r.log_sums_s[index] = row.shift_s + row.log_sum_s;
        r.log_sums_t[index] = row.shift_t + row.log_sum_t;
        r.differences[index] = double(row.shift_gap) + row.centre_gap;
    } else {  // one of them has nothing left
        r.log_sums_s[index] = distribution(row.student, row.factor, r.vocab).log_normaliser();
        r.log_sums_t[index] = distribution(row.teacher, row.factor, r.vocab).log_normaliser();
        r.differences[index] = r.log_sums_s[index] - r.log_sums_t[index];
    }
}

static void tail_gradient_row(const TailGradientRequest& r, int64_t index, Scratch& scratch) {
    const Output dz = output_row(r.dz, r.dz_type, index * r.dz_stride);
    if (r.weight[index] == 0) return fill(dz, r.vocab, 0.0f);
    const float* y = r.logits + index * r.logits_stride;
    const float* derivative = nullptr;
    float factor = float(r.transform.scale / r.temperature);
    const float scale = r.weight[index] * factor, shift = r.shift[index];
    if (r.transform.softcap > 0) {
        float* slope = scratch.row(Scratch::DERIVATIVE);
        transform_row(y, scratch.row(Scratch::STUDENT), slope, r.vocab, Curve(r.transform, r.temperature));
        y = scratch.row(Scratch::STUDENT), derivative = slope, factor = 1.0f;
    }
    sweep(
        r.vocab,
        [&](int64_t i, auto count) {
            Vec x = exp_below<Vec>(take(y + i, count, -INF) * factor - shift) * scale;
            if (derivative) x *= take(derivative + i, count, 0.0f);
            put(dz, i, x, count);
        },
        [] {});
}

// ------------------------------------------------------------------------------------------------------------ threads

// Calls row(index, next, scratch) for each row, which thread by which comes first; a row's result does not depend on
// that. `next` is the row that the same thread comes to next, or this one again where that is not known: the last rows
// go to whoever is free. No row is begun once a thread had no memory for its intermediates.
template <class Row>
static Outcome for_each_row(int64_t n, int64_t vocab, int threads, const Row& row) {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    const auto work = [&] {
        try {
            Scratch scratch(vocab);
            for (int64_t i = take(); i < n && !failed.load(std::memory_order_relaxed);) {
                const bool many = n - i > 4 * int64_t(threads);
                const int64_t then = many ? take() : i;
                row(i, then, scratch);
                i = many ? then : take();
            }
        } catch (const std::bad_alloc&) {
            failed = true;
        }
    };
    const Outcome outcome = on_threads(std::min<int64_t>(threads, n), work, [] {});
    return failed ? OUT_OF_MEMORY : outcome;
}

}  // namespace opsd

extern "C" {

int opsd_vector_lanes() { return opsd::LANES; }

int opsd_divergence_rows(const opsd::DivergenceRequest* request) {
    const opsd::DivergenceRows rows(*request);
    return opsd::for_each_row(request->n, request->vocab, request->threads, rows);
}

int opsd_logprob_rows(const opsd::LogprobRequest* request) {
    return opsd::for_each_row(request->n, request->vocab, request->threads, [&](int64_t i, int64_t, auto& scratch) {
        opsd::logprob_row(*request, i, scratch);
    });
}

int opsd_top_k_rows(const opsd::TopKRequest* request) {
    return opsd::for_each_row(request->n, request->vocab, request->threads, [&](int64_t i, int64_t, auto& scratch) {
        opsd::top_k_row(*request, i, scratch);
    });
}

int opsd_outside_rows(const opsd::OutsideRequest* request) {
    const opsd::Curves curves(request->student_transform, request->teacher_transform, request->temperature);
    return opsd::for_each_row(request->n, request->vocab, request->threads, [&](int64_t i, int64_t, auto& scratch) {
        opsd::outside_row(*request, curves, i, scratch);
    });
}

int opsd_tail_gradient_rows(const opsd::TailGradientRequest* request) {
    return opsd::for_each_row(request->n, request->vocab, request->threads, [&](int64_t i, int64_t, auto& scratch) {
        opsd::tail_gradient_row(*request, i, scratch);
    });
}
}
