// The mathematics of one vocabulary entry of the row pass, for host and device.
//
// F is float, or a vector of floats with the operators of one (GCC and Clang vector extensions). Masks are what F's
// comparisons give, and `m ? a : b` selects. NaN survives everything here: each clamp keeps it.
//
// Teacher and student are nearly the same distribution, so nothing that vanishes with their difference is computed as
// a difference. With d = log p_S - log p_T, a = |d|, and `big` the larger of the two probabilities:
//
//     t = e^-a - 1                     p_S - p_T    = +-big t
//     A = e^-a - 1 + a  >= 0           p_S phi(-d)  = big A  where the student is the larger (phi(x) = e^x - 1 - x)
//     B = 1 - e^-a - a e^-a  >= 0      p_T phi(d)   = big B  there, and A, B change places where it is the smaller
//
// and the generalised JSD's entry is big (b B - v^2 + (1 + v) L), with b the smaller one's weight in the mixture m,
// v = b t = m / big - 1 and L = v - log1p(v): three non-negative sums of second order in d.
//
// M says how exponentials and logarithms are computed: Exact, by polynomials, on vectors too; Fast, on floats, by the
// approximations that a GPU has instructions for, with series where those lose digits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define OPSD_HD __host__ __device__ __forceinline__
#define OPSD_UNROLL _Pragma("unroll")
#else
#define OPSD_HD inline __attribute__((always_inline))
#define OPSD_UNROLL
#endif

namespace opsd {

// The unsigned and signed integers of F's shape, and back.
template <class F>
struct Shape;
template <>
struct Shape<float> {
    using Unsigned = uint32_t;
    using Signed = int32_t;
    static OPSD_HD float from_signed(int32_t x) { return float(x); }
};

template <class To, class From>
OPSD_HD To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

template <class F>
OPSD_HD F splat(float x) {
    return x - F{};  // minus, for x + 0 is not the identity of a signed zero and would not be folded
}

constexpr float INF = __builtin_inff();
constexpr float FAR = 128.0f;  // e^-FAR is 0 in float32 beside 1, so a gap beyond it changes nothing but a itself
constexpr float LOG2E = 1.44269504f, LN2 = 0.693147181f;

struct Exact {};
struct Fast {};
template <class M>
constexpr bool FAST = std::is_same<M, Fast>::value;

// The approximations: 2^x to 2^-22 of itself, log2 x to 2^-22 (of itself outside of (1/2, 2)), results and arguments
// below the normal numbers being 0. The host's have as few digits, so that what is tested there holds on a device.
#ifdef __CUDA_ARCH__
OPSD_HD float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
OPSD_HD float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
OPSD_HD float quotient_fast(float x, float y) { return __fdividef(x, y); }
// The larger one; NaN where one of them is.
OPSD_HD float greatest(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
OPSD_HD float magnitude(float x) { return fabsf(x); }
OPSD_HD float larger(float x, float y) { return fmaxf(x, y); }  // of two of which one may be NaN, the other
OPSD_HD float smaller(float x, float y) { return fminf(x, y); }
#else
OPSD_HD float exp2_fast(float x) {
    const double y = std::exp2(double(x));
    return y < 0x1p-126 ? 0.0f : float(y * (1.0 + 0x1p-22 * std::sin(1e6 * double(x))));
}
OPSD_HD float log2_fast(float x) {
    const double y = std::log2(x < 0x1p-126f ? 0.0 : double(x)), size = x > 0.5f && x < 2.0f ? 1.0 : std::fabs(y);
    return std::isfinite(y) ? float(y + size * 0x1p-22 * std::sin(1e6 * double(x))) : float(y);
}
OPSD_HD float quotient_fast(float x, float y) { return x / y; }
OPSD_HD float greatest(float x, float y) { return x != x || x > y ? x : y; }
OPSD_HD float magnitude(float x) { return std::fabs(x); }
OPSD_HD float larger(float x, float y) { return std::fmax(x, y); }
OPSD_HD float smaller(float x, float y) { return std::fmin(x, y); }
#endif

// x = n ln 2 + r with |r| <= ln 2 / 2, and 2^n; phi = e^r - 1 - r.
template <class F>
struct Reduced {
    F r, phi, scale;
};

template <class F>
OPSD_HD Reduced<F> reduced(F x) {
    using U = typename Shape<F>::Unsigned;
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
    const F shifted = x * 1.44269504f + magic;
    const F n = shifted - magic;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F q = r * 1.9875691500e-4f + 1.3981999507e-3f;
    q = q * r + 8.3334519073e-3f;
    q = q * r + 4.1665795894e-2f;
    q = q * r + 1.6666665459e-1f;
    q = q * r + 5.0000001201e-1f;
    return {r, q * r * r, bits_as<F>((bits_as<U>(shifted) << 23) + 0x3f800000u)};
}

constexpr float LOWEST = -87.0f;  // the last power of two above this is a normal number

// e^x for x <= 1; 0 below LOWEST.
template <class F>
OPSD_HD F exp_below(F x) {
    const Reduced<F> e = reduced<F>(x < LOWEST ? splat<F>(LOWEST) : x);
    const F y = e.scale + e.scale * (e.r + e.phi);
    return x < LOWEST ? splat<F>(0.0f) : y;
}

// A pair of probabilities by their log-ratio, as above. a is cut at FAR, `excess` is what was cut (infinity included).
template <class F>
struct Gap {
    F a, excess, e, t, A, B;  // e = e^-a
};

OPSD_HD Gap<float> gap_fast(float d) {
    Gap<float> g;
    const float whole = magnitude(d);
    g.a = smaller(whole, FAR);
    g.excess = whole - g.a;
    g.e = exp2_fast(g.a * -LOG2E);
    // (e^-a - 1 + a) / a^2 on [0, 0.35] to 1.5e-7; beyond, 1 - e^-a has lost less than two bits
    float q = g.a * -7.4246372e-3f + 4.1472085e-2f;
    q = q * g.a - 1.6665316e-1f;
    q = q * g.a + 0.5f;
    const float series = g.a * g.a * q, far = g.e - 1.0f;
    const bool near = g.a < 0.35f;
    g.A = near ? series : far + g.a;
    g.t = near ? series - g.a : far;
    g.B = -(g.A + g.a * g.t);
    return g;
}

template <class F, class M = Exact>
OPSD_HD Gap<F> gap(F d) {
    if constexpr (FAST<M>) return gap_fast(d);
    Gap<F> g;
    const F whole = d < 0.0f ? -d : d;
    g.a = whole > FAR ? splat<F>(FAR) : whole;
    g.excess = whole - g.a;
    const F x = -g.a;
    const Reduced<F> e = reduced<F>(x < LOWEST ? splat<F>(LOWEST) : x);
    const F part = e.r + e.phi;
    g.e = x < LOWEST ? splat<F>(0.0f) : e.scale + e.scale * part;
    g.t = e.scale * part + (e.scale - 1.0f);
    g.A = g.a < 0.34f ? e.phi : g.t + g.a;  // below ln 2 / 2 nothing was reduced: phi is A itself, without cancellation
    g.B = -(g.A + g.a * g.t);
    return g;
}

// log1p(v) and L = v - log1p(v), for -1 < v <= 0.
template <class F>
struct Log1p {
    F log, L;
};

OPSD_HD Log1p<float> log1p_fast(float v) {
    // (v - log1p(v)) / v^2 on [-0.25, 0] to 6e-7
    float p = v * 3.0067401e-1f - 1.6706305e-1f;
    p = p * v + 2.5309751e-1f;
    p = p * v - 3.3333424e-1f;
    p = p * v + 0.5f;
    Log1p<float> out;
    out.L = v > -0.25f ? v * v * p : v - log2_fast(larger(1.0f + v, 1e-37f)) * LN2;
    out.log = v - out.L;
    return out;
}

template <class F, class M = Exact>
OPSD_HD Log1p<F> log1p_below(F v) {
    if constexpr (FAST<M>) return log1p_fast(v);
    using U = typename Shape<F>::Unsigned;
    using S = typename Shape<F>::Signed;
    const F one_plus = 1.0f + v;
    const F y = one_plus < 1e-37f ? splat<F>(1e-37f) : one_plus;
    const S k = bits_as<S>(bits_as<U>(y) - 0x3f3504f3u) >> 23;  // y = 2^k m, m in [sqrt 1/2, sqrt 2)
    const F m = bits_as<F>(bits_as<U>(y) - (bits_as<U>(k) << 23));
    const F kf = Shape<F>::from_signed(k);
    const auto near = kf == 0.0f;
    const F f = near ? v : m - 1.0f;  // v itself: 1 + v has lost its last bits
    F p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const F rest = f * f * (0.5f - f * p);  // f - log1p(f)
    Log1p<F> out;
    const F far = kf * 0.693359375f + (f - (rest + kf * 2.12194440e-4f));
    out.log = near ? f - rest : far;
    out.L = near ? rest : v - far;
    return out;
}

template <class M, class F>
OPSD_HD F quotient(F x, F y) {
    if constexpr (FAST<M>) return quotient_fast(x, y);
    else return x / y;
}

// tanh(x) with e = e^-2|x|, from which what is small beside 1 follows without cancellation.
template <class F>
struct Tanh {
    F value, e;
    template <class M = Exact>
    OPSD_HD F derivative() const {
        return quotient<M>(4.0f * e, (1.0f + e) * (1.0f + e));
    }
};

template <class F, class M = Exact>
OPSD_HD Tanh<F> tanh_of(F x) {
    const Gap<F> g = gap<F, M>(x + x);
    const F size = quotient<M>(-g.t, 1.0f + g.e);
    return {x < 0.0f ? -size : size, g.e};
}

// tanh(x) - tanh(y) = tanh(x - y) (1 - tanh(x) tanh(y)), given x - y as accurately as the caller knows it.
template <class F, class M = Exact>
OPSD_HD F tanh_difference(F x, F y, F x_minus_y, Tanh<F> tanh_x, Tanh<F> tanh_y) {
    const F same_sign = tanh_x.e + tanh_y.e, opposite = 1.0f + tanh_x.e * tanh_y.e;
    const F twice = 2.0f * (x * y < 0.0f ? opposite : same_sign);
    const F rest = quotient<M>(twice, (1.0f + tanh_x.e) * (1.0f + tanh_y.e));
    return tanh_of<F, M>(x_minus_y).value * rest;
}

enum Beta { FORWARD = 0, REVERSE = 1, MIXTURE = 2 };

// One entry: its term of the divergence in a form that needs no cancellation, its plain term l (what an entry clip
// compares, which needs it only where it is positive), the direction g = p_S c of the gradient, and both probabilities.
// dz = g - p_S sum(g). The forward KL's c is not given: its g has more digits than p_S c.
template <class F>
struct Entry {
    F term, plain, c, g, p_s, p_t;
};

struct Weights {
    float teacher, student;  // of the mixture: beta, 1 - beta
};

// d = log p_S - log p_T; big: the larger of the two.
template <int BETA, bool GRAD, class F, class M = Exact>
OPSD_HD Entry<F> entry(F d, F big, Weights weight) {
    const Gap<F> g = gap<F, M>(d);
    const F small = big * g.e;
    const auto student_larger = d > 0.0f;
    Entry<F> out;
    out.p_s = student_larger ? big : small;
    out.p_t = student_larger ? small : big;
    out.c = out.g = F{};
    if constexpr (BETA == MIXTURE) {
        const F b = student_larger ? splat<F>(weight.teacher) : splat<F>(weight.student);
        const F v = b * g.t;
        const Log1p<F> w = log1p_below<F, M>(v);
        out.term = big * (b * g.B + (w.L * (1.0f + v) - v * v));
        out.plain = out.term;
        if (GRAD) out.c = (student_larger ? w.log : w.log + g.a) * -weight.student;  // log(p_S / m)
    } else {
        // the forward KL's l = -p_T d is positive where the teacher is the larger, the reverse one's p_S d elsewhere
        const auto positive = BETA == REVERSE ? d > 0.0f : d < 0.0f;
        const auto infinite = g.excess == INF;  // one model lacks the entry: -+p, which balances the rest of the sum
        const F up = g.A + g.excess;
        out.term = big * (positive ? (infinite ? g.t : up) : g.B);
        out.plain = positive ? big * (g.a + g.excess) : splat<F>(0.0f);
        if (GRAD && BETA == REVERSE) out.c = student_larger ? g.a + g.excess : -g.a;
        if (GRAD && BETA == FORWARD) out.g = big * (student_larger ? -g.t : g.t);
    }
    if (GRAD && BETA != FORWARD) out.g = out.p_s * out.c;
    return out;
}

// Whether an entry's own term of a KL is infinite; the generalised JSD's never is.
template <int BETA, class F>
OPSD_HD auto is_infinite(F d) {
    if constexpr (BETA == REVERSE) return d == INF;
    else return d == -INF;
}

// What the entry clip makes of an entry: whether it is over, and by how much if that is finite.
template <class F>
struct Clipped {
    decltype(F{} > 0.0f) over;
    F amount;
};

template <int BETA, class F>
OPSD_HD Clipped<F> clipped(const Entry<F>& e, F d, float entry_clip) {
    Clipped<F> out{e.plain > entry_clip, e.plain - entry_clip};
    if constexpr (BETA != MIXTURE) {
        const auto infinite = is_infinite<BETA>(d);
        out.over = out.over | infinite;
        out.amount = infinite ? F{} : out.amount;
    }
    out.amount = out.over ? out.amount : F{};
    return out;
}

// dz = g - p_S sum(g): any multiple of p_S may be taken off g first. Where one token, the top, has most of the
// probability, p, that is the multiple which leaves nothing of the top's own g: it would keep the part 1 - p of it,
// which float32 does not know. Under an entry clip, g of the forward KL is p_S - M p_T or, where the teacher thinks
// little of the top, sure or not, -M p_T: p_S would swallow a small p_T, and what the clips leave of its sum.
struct Level {
    float taken = 0;
    bool apart = false, sure = false;
};

// p_s, p_t, d: the top's.
template <int BETA, bool CLIP, class M = Exact>
OPSD_HD Level level_at(float p_s, float p_t, float d, Weights weights, float entry_clip) {
    Level level;
    level.sure = p_s > 0.5f;
    level.apart = BETA == FORWARD && CLIP && p_t < 0.5f * p_s;
    if (!level.sure) return level;
    const Entry<float> top = entry<BETA, true, float, M>(d, d > 0 ? p_s : p_t, weights);
    const bool infinite = BETA != MIXTURE && is_infinite<BETA>(d);
    const bool over = CLIP && (top.plain > entry_clip || infinite);
    if (BETA == FORWARD) {
        const float ratio = p_t / p_s;
        level.taken = level.apart ? (over ? 0.0f : -ratio) : (over ? 1.0f : top.g / p_s);
    } else {
        level.taken = over ? (BETA == REVERSE ? -1.0f : 0.0f) : top.c;
    }
    return level;
}

// An entry's g less its level.
template <int BETA, bool CLIP, class F, class Mask>
OPSD_HD F levelled(const Entry<F>& e, Mask over, Level level) {
    if constexpr (BETA == FORWARD) {
        F g = e.g;
        if constexpr (CLIP) g = level.apart ? (over ? F{} : -e.p_t) : (over ? e.p_s : g);
        return g - e.p_s * level.taken;
    } else {  // the constant of the reverse KL's gradient, 1, cancels but for the clipped entries
        F c = e.c;
        if constexpr (CLIP) c = over ? splat<F>(BETA == REVERSE ? -1.0f : 0.0f) : c;
        return e.p_s * (c - level.taken);
    }
}

// A token as its table has it, and whether it has a gradient; one whose loss is NaN does: it must stay visible.
template <class T>
struct Token {
    T loss, divergence, amount;
    bool over, kept;
};

// From a row's sums: the finite terms, what the entry clip took from them, how many terms are infinite.
template <class T>
OPSD_HD Token<T> token_of(T divergence, T amount, T infinite, T entry_clip, T token_clip) {
    Token<T> token{divergence - amount, divergence, amount, false, false};
    const bool clip = entry_clip < T(INF);
    if (infinite > 0) {
        token.loss = clip ? token.loss + entry_clip * infinite : T(INF);
        token.divergence = T(INF);
        if (clip) token.amount = T(INF);
    }
    token.over = token.loss > token_clip;
    token.kept = !token.over && token.loss != T(INF);
    if (token.over) {
        token.amount += token.loss - token_clip;
        token.loss = token_clip;
    }
    return token;
}

}  // namespace opsd
