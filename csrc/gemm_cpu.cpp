// Matrix products on a CPU: C (+)= A·B, float32 out of float32, bfloat16 or float16, accumulated in float32.
//
// For CPUs whose vectors are wider than those that their BLAS uses. The blocking is that of GotoBLAS and BLIS: panels
// of A and B are packed so that the innermost loop reads them in order; a panel of B and the rows of A that it is
// multiplied with stay in the second-level cache, a tile of C in registers. Threads pack one block together, meet,
// multiply it tile by tile, and meet again. An element's sum has one order, whatever the number of threads.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>

#include "threads.h"
#include "vectors.h"

namespace opsd {

#if defined(__AVX512F__)
constexpr int MR = 8;  // a tile is MR x NR elements of C: 24 of the 32 registers
#else
constexpr int MR = 4;
#endif
constexpr int NV = 3, NR = NV * LANES;
constexpr int64_t KC = 512;         // of the sum, at a time
constexpr int64_t RUN = 64;         // of them, one after the other
constexpr int64_t NC = 32 * NR;     // columns of B that are packed at a time
constexpr int64_t MC = 16 * MR;     // rows of A that one thread multiplies with a panel of B at a time
constexpr int64_t MB = 8 * MC;      // rows of A that are packed at a time
constexpr int64_t THREAD_WORK = 1 << 22;  // multiplications that are worth a thread

// Mirrored field by field by opsd_kernels/native.py.
struct GemmRequest {
    const void* a;  // (m, k)
    const void* b;  // (k, n)
    float* c;       // (m, n), rows c_stride apart, each without gaps
    void* scratch;  // opsd_gemm_scratch(m, n, k) bytes, aligned to a vector
    int64_t m, n, k;
    int64_t a_row, a_column, b_row, b_column, c_stride;  // strides in elements; one of A's and one of B's is 1
    int32_t a_type, b_type, add, threads;
};

// The panels of A (their lines are its rows) or of B (its columns): line i's element k is at i·line + k·step.
struct Operand {
    const void* data;
    int64_t line, step;
    int32_t type;
};

template <class Element>
static inline const Element* at(const Operand& from, int64_t line, int64_t k) {
    return static_cast<const Element*>(from.data) + line * from.line + k * from.step;
}

// to[k·W + i] = line i's element k, for W lines from `first` on, of which `count` exist; zeros for the others.
template <int W, class Element>
static void pack(float* to, const Operand& from, int64_t first, int64_t count, int64_t k0, int64_t kc) {
    if (count < W) std::fill_n(to, W * kc, 0.0f);
    if (from.line == 1) {
        for (int64_t k = 0; k < kc; ++k, to += W) {
            const Element* x = at<Element>(from, first, k0 + k);
            if (count < W)
                for (int64_t i = 0; i < count; ++i) to[i] = widened(x[i]);
            else
                for (int i = 0; i < W; ++i) to[i] = widened(x[i]);
        }
        return;
    }
    const int64_t whole = kc - kc % LANES;
    for (int part = 0; part < W && part < count; part += LANES) {
        constexpr int WIDTH = W < LANES ? W : LANES;
        const int64_t known = std::min<int64_t>(WIDTH, count - part);
        for (int64_t k = 0; k < whole; k += LANES) {
            Vec rows[LANES] = {};
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; ++i)
                if (i < known) rows[i] = widened_load(at<Element>(from, first + part + i, k0 + k));
            transpose(rows);
#pragma GCC unroll 16
            for (int i = 0; i < LANES; ++i) memcpy(to + (k + i) * W + part, &rows[i], WIDTH * sizeof(float));
        }
    }
    for (int64_t k = whole; k < kc; ++k)
        for (int64_t i = 0; i < std::min<int64_t>(count, W); ++i)
            to[k * W + i] = widened(*at<Element>(from, first + i, k0 + k));
}

template <int W>
static void pack(float* to, const Operand& from, int64_t first, int64_t count, int64_t k0, int64_t kc) {
    if (from.type == FLOAT32) pack<W, float>(to, from, first, count, k0, kc);
    else if (from.type == BFLOAT16) pack<W, BFloat16>(to, from, first, count, k0, kc);
    else pack<W, Float16>(to, from, first, count, k0, kc);
}

// One tile of C from a panel of A (kc, MR) and one of B (kc, NR). Sums are of RUN products at a time, then of those: an
// error that grows with the length of a sum stays small.
template <bool ADD>
static void tile(const float* a, const float* b, int64_t kc, float* c, int64_t stride, int64_t rows, int64_t columns) {
    float before[MR][NR];  // of the runs that are done
    Vec sum[MR][NV] = {};
    for (int64_t start = 0; start < kc; start += RUN) {
        for (auto& row : sum)
            for (Vec& x : row) x = Vec{};
        for (int64_t k = start; k < std::min(start + RUN, kc); ++k, a += MR, b += NR) {
            Vec y[NV];
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) y[j] = load(b + j * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < MR; ++i) {
                const Vec x = splat<Vec>(a[i]);
#pragma GCC unroll 4
                for (int j = 0; j < NV; ++j) sum[i][j] += x * y[j];
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) {
                if (start) sum[i][j] += load(before[i] + j * LANES);
                store(before[i] + j * LANES, sum[i][j]);
            }
    }
    if (rows == MR && columns == NR) {
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < NV; ++j) {
                float* to = c + i * stride + j * LANES;
                store(to, ADD ? load(to) + sum[i][j] : sum[i][j]);
            }
        return;
    }
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) c[i * stride + j] = (ADD ? c[i * stride + j] : 0.0f) + before[i][j];
}

static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// So many at a time, at most `most`, in parts of about one size.
static int64_t even(int64_t whole, int64_t most, int64_t multiple) {
    return parts(parts(whole, parts(whole, most)), multiple) * multiple;
}

struct Blocks {
    int64_t k, n, m;  // what is packed at a time: (k, n) of B, (m, k) of A
    Blocks(int64_t m, int64_t n, int64_t k) : k(even(k, KC, 1)), n(even(n, NC, NR)), m(even(m, MB, MR)) {}
    int64_t floats() const { return k * (n + m); }
};

// Threads meet here. Who waits for long sleeps: a thread that a busy machine has put aside then finds a free processor.
class Meeting {
public:
    explicit Meeting(int64_t count) : count(count) {}
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        if (++here == count) return open();
        const int64_t mine = round.load(std::memory_order_relaxed);
        lock.unlock();
        for (int spins = 0; spins < SPINS && round.load(std::memory_order_acquire) == mine; ++spins) pause();
        if (round.load(std::memory_order_acquire) != mine) return;
        lock.lock();
        opened.wait(lock, [&] { return round.load(std::memory_order_relaxed) != mine; });
    }
    // One thread fewer comes.
    void leave() {
        const std::lock_guard<std::mutex> lock(mutex);
        if (--count == here) open();
    }

private:
    static constexpr int SPINS = 1000;  // some tens of microseconds, what a share of the work takes
    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
    }
    void open() {
        here = 0;
        round.fetch_add(1, std::memory_order_release);
        opened.notify_all();
    }

    std::mutex mutex;
    std::condition_variable opened;
    int64_t count, here = 0;
    std::atomic<int64_t> round{0};
};

class Gemm {
public:
    Gemm(const GemmRequest& request, int64_t threads)
        : r(request),
          blocks(r.m, r.n, r.k),
          a{r.a, r.a_row, r.a_column, r.a_type},
          b{r.b, r.b_column, r.b_row, r.b_type},
          packed_b(static_cast<float*>(r.scratch)),
          packed_a(packed_b + blocks.k * blocks.n),
          meeting(threads) {}

    // What each thread does.
    void work() {
        int phase = 0;
        for (int64_t n0 = 0; n0 < r.n; n0 += blocks.n)
            for (int64_t k0 = 0; k0 < r.k; k0 += blocks.k)
                for (int64_t m0 = 0; m0 < r.m; m0 += blocks.m) {
                    const int64_t kc = std::min(blocks.k, r.k - k0);
                    const int64_t n = std::min(blocks.n, r.n - n0), m = std::min(blocks.m, r.m - m0);
                    const int64_t b_panels = parts(n, NR), a_panels = parts(m, MR), new_panels = m0 ? 0 : b_panels;
                    share(phase++, new_panels + parts(a_panels, NV), [&](int64_t i) {
                        if (i < new_panels)
                            pack<NR>(packed_b + i * NR * kc, b, n0 + i * NR, std::min<int64_t>(NR, n - i * NR), k0, kc);
                        const int64_t first = (i - new_panels) * NV;
                        for (int64_t p = first; i >= new_panels && p < std::min(first + NV, a_panels); ++p)
                            pack<MR>(packed_a + p * MR * kc, a, m0 + p * MR, std::min<int64_t>(MR, m - p * MR), k0, kc);
                    });
                    const auto multiply = r.add || k0 ? tile<true> : tile<false>;
                    share(phase++, b_panels * parts(m, MC), [&](int64_t i) {
                        const int64_t column = i % b_panels * NR, first = i / b_panels * MC;
                        for (int64_t row = first; row < std::min(first + MC, m); row += MR)
                            multiply(
                                packed_a + row * kc, packed_b + column * kc, kc,
                                r.c + (m0 + row) * r.c_stride + n0 + column, r.c_stride, std::min<int64_t>(MR, m - row),
                                std::min<int64_t>(NR, n - column)
                            );
                    });
                }
    }

private:
    // body(i) for i < count, each by the thread that comes first; returns when all are done.
    template <class Body>
    void share(int phase, int64_t count, Body body) {
        // a counter is set to 0 a phase before its own, when all have left the phase that used it last
        next[(phase + 1) % 3].store(0, std::memory_order_relaxed);
        for (int64_t i; (i = next[phase % 3].fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
        meeting.wait();
    }

    const GemmRequest& r;
    const Blocks blocks;
    const Operand a, b;
    float* const packed_b;
    float* const packed_a;
    std::atomic<int64_t> next[3] = {};

public:
    Meeting meeting;
};

}  // namespace opsd

extern "C" {

int64_t opsd_gemm_scratch(int64_t m, int64_t n, int64_t k) {
    return opsd::Blocks(m, n, k).floats() * int64_t(sizeof(float));
}

int opsd_gemm(const opsd::GemmRequest* request) {
    const int64_t worth = request->m * request->n * request->k / opsd::THREAD_WORK;
    const int64_t wanted = std::max<int64_t>(1, std::min<int64_t>(request->threads, worth));
    opsd::Gemm gemm(*request, wanted);
    return opsd::on_threads(wanted, [&] { gemm.work(); }, [&] { gemm.meeting.leave(); });
}
}
