// Vectors of floats as wide as the CPU has them, by GCC and Clang vector extensions.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "requests.h"
#include "row_math.h"

namespace opsd {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;
typedef float Vec __attribute__((vector_size(BYTES)));
typedef uint32_t VecU __attribute__((vector_size(BYTES)));
typedef int32_t VecI __attribute__((vector_size(BYTES)));
typedef double VecD __attribute__((vector_size(2 * BYTES)));
typedef uint16_t VecHalf __attribute__((vector_size(BYTES / 2)));

template <>
struct Shape<Vec> {
    using Unsigned = VecU;
    using Signed = VecI;
    static OPSD_HD Vec from_signed(VecI x) { return __builtin_convertvector(x, Vec); }
};

static inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof(x));
    return x;
}
static inline void store(float* to, Vec x) { memcpy(to, &x, sizeof(x)); }

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// The value of a float16, from its bits in the low half: F is a float or a vector of them, U its bits.
template <class F, class U>
static inline F from_float16(U half) {
    const U size = (half & 0x7fffu) << 13;
    // the exponent's bias differs by 112; the product is exact, and right for subnormal numbers too
    const U bits = bits_as<U>(bits_as<F>(size) * 0x1p112f);
    return bits_as<F>(((half & 0x8000u) << 16) | (size >= 0x0f800000u ? bits | 0x7f800000u : bits));
}

static inline float widened(float x) { return x; }
static inline float widened(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
static inline float widened(Float16 x) { return from_float16<float>(uint32_t(x.bits)); }

static inline VecU load_halves(const void* from) {
    VecHalf x;
    memcpy(&x, from, sizeof(x));
    return __builtin_convertvector(x, VecU);
}
static inline Vec widened_load(const float* from) { return load(from); }
static inline Vec widened_load(const BFloat16* from) { return bits_as<Vec>(load_halves(from) << 16); }
static inline Vec widened_load(const Float16* from) { return from_float16<Vec>(load_halves(from)); }

// Exchanges the off-diagonal blocks of a LANES x LANES matrix, of 1, 2, 4, ... elements: transposes it.
template <int WIDTH, size_t... I>
static inline __attribute__((always_inline)) void exchange(Vec* row, std::index_sequence<I...>) {
#if !defined(__clang__)
    constexpr VecI low = {(I & WIDTH ? int(LANES + I) - WIDTH : int(I))...};
    constexpr VecI high = {(I & WIDTH ? int(LANES + I) : int(I) + WIDTH)...};
#endif
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
        if (!(i & WIDTH)) {
            const Vec x = row[i], y = row[i + WIDTH];
#if defined(__clang__)
            row[i] = __builtin_shufflevector(x, y, (I & WIDTH ? int(LANES + I) - WIDTH : int(I))...);
            row[i + WIDTH] = __builtin_shufflevector(x, y, (I & WIDTH ? int(LANES + I) : int(I) + WIDTH)...);
#else
            row[i] = __builtin_shuffle(x, y, low);
            row[i + WIDTH] = __builtin_shuffle(x, y, high);
#endif
        }
    if constexpr (2 * WIDTH < LANES) exchange<2 * WIDTH>(row, std::index_sequence<I...>());
}
static inline __attribute__((always_inline)) void transpose(Vec* row) {
    exchange<1>(row, std::make_index_sequence<LANES>());
}

}  // namespace opsd
