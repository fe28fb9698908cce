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
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define OPSD_HD __host__ __device__ __forceinline__
#else
#define OPSD_HD inline __attribute__((always_inline))
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

template <class F>
OPSD_HD Gap<F> gap(F d) {
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

template <class F>
OPSD_HD Log1p<F> log1p_below(F v) {
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

// tanh(x) with e = e^-2|x|, from which what is small beside 1 follows without cancellation.
template <class F>
struct Tanh {
    F value, e;
    OPSD_HD F derivative() const { return 4.0f * e / ((1.0f + e) * (1.0f + e)); }
};

template <class F>
OPSD_HD Tanh<F> tanh_of(F x) {
    const Gap<F> g = gap<F>(x + x);
    const F size = -g.t / (1.0f + g.e);
    return {x < 0.0f ? -size : size, g.e};
}

// tanh(x) - tanh(y) = tanh(x - y) (1 - tanh(x) tanh(y)), given x - y as accurately as the caller knows it.
template <class F>
OPSD_HD F tanh_difference(F x, F y, F x_minus_y, Tanh<F> tanh_x, Tanh<F> tanh_y) {
    const F same_sign = tanh_x.e + tanh_y.e, opposite = 1.0f + tanh_x.e * tanh_y.e;
    const F rest = 2.0f * (x * y < 0.0f ? opposite : same_sign) / ((1.0f + tanh_x.e) * (1.0f + tanh_y.e));
    return tanh_of<F>(x_minus_y).value * rest;
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
template <int BETA, bool GRAD, class F>
OPSD_HD Entry<F> entry(F d, F big, Weights weight) {
    const Gap<F> g = gap<F>(d);
    const F small = big * g.e;
    const auto student_larger = d > 0.0f;
    Entry<F> out;
    out.p_s = student_larger ? big : small;
    out.p_t = student_larger ? small : big;
    out.c = out.g = F{};
    if constexpr (BETA == MIXTURE) {
        const F b = student_larger ? splat<F>(weight.teacher) : splat<F>(weight.student);
        const F v = b * g.t;
        const Log1p<F> w = log1p_below<F>(v);
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

}  // namespace opsd
