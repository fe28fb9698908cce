// The row pass on Hopper (sm_90a), float32 logits: both rows of a token are read from memory once.
//
// A cluster of up to 16 blocks takes a token at a time and holds its two rows in shared memory, 8 bytes per column:
// 10 bytes of memory traffic per column with a bfloat16 dz, where two sweeps over memory take 18. A row's way:
//
//   A  each warp waits for its slice, chunk by chunk, and sums both normalisers of it;
//   -  all parts are joined (row_parts.h), through the shared memory of the cluster's blocks: barrier 1;
//   B  g and p_S of each entry replace its logits; the loss, statistics and sum(g) are added up;
//   -  the sums are joined likewise: barrier 2;
//   C  dz is written, and as soon as a chunk has been, the next row's begins to arrive in its place.
//
// Budget per multiprocessor, 227 KiB of shared memory and 65,536 registers: two blocks of 256 threads, so that one's
// loads go on under the other's arithmetic, need <= 128 registers a thread and <= 113 KiB a block. At V = 151,936 a
// block of 16 holds 76,032 bytes of logits; at 262,144 it is 131,072, and one block fits. The largest V is 458,752
// (16 blocks of 224 KiB). Besides the rows a block needs 1,824 bytes. Few columns take fewer blocks; few tokens take
// more.
//
// Measured on an H200: a row of V = 151,936 in 0.86 us of the whole device, as long as two sweeps over memory take, with
// 37 % of the memory's rate and 48 % of the issue slots in use. 14 clusters of 16 blocks run at once, 224 blocks where
// 264 would fit; what else holds it up, the barriers or the joining of parts, is not known.
//
// The tests run this file on a CPU, each thread as a coroutine, with stand-ins for what hopper.cuh has. What must hold
// and cannot be seen there:
//   - A warp reads and writes its own slice alone, and a lane its own quads (those congruent to it modulo 32), in A, B
//     and C alike: between the phases nothing of the rows needs a barrier. In A alone a lane may read another's, to
//     find the top: after __syncwarp, and barrier 1 is before B. dz may be the student itself: a slice is read whole
//     before the warp that writes it does so, and no one else reads it from memory.
//   - A chunk's barrier completes once per row; its parity is the row's number modulo 2. Before a chunk is refilled,
//     all lanes have read it (__syncwarp) and made that known to the copy engine (fence.proxy.async).
//   - `parts` is written by all blocks before barrier 1 and read after it; `sums` likewise with barrier 2. A block
//     passes barrier 2 only after every block has read `parts`, and barrier 1 of the next row only after every block
//     has read `sums`: one copy of each is enough. All threads of a cluster's blocks reach both as often: they have
//     the same rows. No block writes to another's shared memory before all have started (the first cluster_sync) or
//     after one may have ended (the last).
//   - Bulk copies need addresses and sizes that are multiples of 16: of rows that are not so placed every element is
//     copied by itself, and the up to three columns of a last partial quad always are.
//   - Every block of a cluster joins the same numbers in the same order, so all agree on a token's fate to the bit.
#pragma once

#include <climits>
#include <cmath>
#include <cstring>

#include "requests.h"
#include "row_parts.h"
// and hopper.cuh, or what stands for it, before this file

namespace opsd {

constexpr int THREADS = 256, WARPS = THREADS / 32, LARGEST_CLUSTER = 16;
constexpr int CHUNK = 128, MOST_CHUNKS = 7;  // quads, four per lane; 7 chunks are 458,752 columns
constexpr unsigned ALL = 0xffffffffu;

// ------------------------------------------------------------------------------------------------------------ problems

struct Problem {
    DivergenceRequest request;
    Tempering tempering;
    Measure measure;
    float token_clip, chain;  // d y / d raw, but for the cap
    int32_t each;             // quads of a warp's slice
    bool bulk;                // both models' rows lie at multiples of 16 bytes
    bool wide_dz;             // and dz's at multiples of 4 elements
};

// Between a cluster's blocks, and a block's warps. Never constructed: nothing is read that was not written.
struct Exchange {
    uint64_t arrived[WARPS][MOST_CHUNKS];
    Part warp_parts[WARPS], parts[LARGEST_CLUSTER];
    Totals warp_sums[WARPS], sums[LARGEST_CLUSTER];
    Norms norms;
};
constexpr int EXCHANGE_QUADS = (sizeof(Exchange) + 15) / 16;  // the shared memory before the rows, in 16 bytes

// Where a warp's slice of a row begins in memory.
struct Source {
    const float* student;
    const float* teacher;
};

// A warp's slice of the row that is there, and of the one that is to come.
struct Rows {
    float* student;  // in shared memory, `each` quads
    float* teacher;
    uint64_t* arrived;
    Slice slice;
    int64_t column;  // of the slice's first entry
    int columns;     // in the slice

    __device__ int whole_chunks() const { return columns / (CHUNK * 4); }
    __device__ int chunks() const { return (slice.count + CHUNK - 1) / CHUNK; }
    __device__ Source source(const DivergenceRequest& r, int64_t index) const {
        return {r.student + index * r.student_stride + column, r.teacher + index * r.teacher_stride + column};
    }

    // Begins to copy the columns [begin, end) of a chunk. All lanes have done with what is there.
    __device__ __forceinline__ void
    fetch_bulk(const Source& from, int chunk, int begin, int bytes, int lane) const {
        fence_copies();
        __syncwarp();
        if (lane == 0) {
            barrier_expect(&arrived[chunk], 2 * bytes);
            if (bytes) {
                copy_bulk(student + begin, from.student + begin, bytes, &arrived[chunk]);
                copy_bulk(teacher + begin, from.teacher + begin, bytes, &arrived[chunk]);
            }
        }
    }
    __device__ void fetch(const Problem& problem, const Source& from, int chunk, int lane) const {
        const int begin = chunk * CHUNK * 4, end = min(begin + CHUNK * 4, columns);
        if (problem.bulk) return fetch_bulk(from, chunk, begin, (end - begin) / 4 * 16, lane);
        __syncwarp();
#pragma unroll 1
        for (int i = begin + lane; i < end; i += 32) {
            copy_word(student + i, from.student + i);
            copy_word(teacher + i, from.teacher + i);
        }
        arrive_after_copies(&arrived[chunk]);
    }

    // After it has arrived: the row's last quad, if this lane has it and it is not whole, is read and filled up.
    __device__ void fill_last(const Problem& problem, int64_t index, int lane) const {
        const DivergenceRequest& r = problem.request;
        const int last = columns / 4;
        if (columns % 4 == 0 || last % 32 != lane) return;
        for (int i = 4 * last; i < 4 * last + 4; ++i) {
            student[i] = i < columns ? r.student[index * r.student_stride + column + i] : -INF;
            teacher[i] = i < columns ? r.teacher[index * r.teacher_stride + column + i] : -INF;
        }
    }
};

__device__ __forceinline__ void quad_of(const float* from, int quad, bool there, float (&to)[4]) {
    const float4 x = there ? reinterpret_cast<const float4*>(from)[quad] : make_float4(-INF, -INF, -INF, -INF);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}
__device__ __forceinline__ void set_quad(float* to, int quad, const float (&x)[4]) {
    reinterpret_cast<float4*>(to)[quad] = make_float4(x[0], x[1], x[2], x[3]);
}

// ---------------------------------------------------------------------------------------------------- joining of parts

// The same of another lane, by whatever shuffle.
template <class Shuffle>
__device__ __forceinline__ Part shuffled(const Part& part, const Shuffle& of) {
    return {of(part.high_s), of(part.rest_s), of(part.high_t),     of(part.rest_t),
            of(part.at_top), of(part.gap_at_top), of(part.top)};
}
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(ALL, x, distance);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int distance = 16; distance; distance /= 2) x = larger(x, __shfl_xor_sync(ALL, x, distance));
    return x;
}

// The parts of lanes [0, count), a power of two, joined; as lane 0 does it, for all.
__device__ __forceinline__ Part joined(Part part, int count, float bits) {
#pragma unroll 1
    for (int distance = 1; distance < count; distance *= 2)
        part = merged(part, shuffled(part, [&](auto x) { return __shfl_xor_sync(ALL, x, distance); }), bits);
    return shuffled(part, [](auto x) { return __shfl_sync(ALL, x, 0); });
}
template <int BETA, bool CLIP, bool STATISTICS>
__device__ void add_up(Totals& totals, int count) {
    for (int distance = 1; distance < count; distance *= 2)
#pragma unroll
        for (int i = 0; i < Totals::COUNT; ++i)
            if (Totals::used<BETA, CLIP, STATISTICS>(i))
                totals.sum[i] += __shfl_xor_sync(ALL, totals.sum[i], distance);
}

// ---------------------------------------------------------------------------------------------------------- the kernel

// A: what the warp knows of its slice.
template <int BETA, bool TRANSFORMED>
__device__ Part part_of(const Rows& rows, const Problem& problem, int64_t index, int parity, int lane) {
    const Tempering& how = problem.tempering;
    Running student, teacher;
    const auto add = [&](int first, auto whole) {  // two quads of each lane
        float y_s[8], y_t[8];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int quad = first + half * 32 + lane;
            const bool there = decltype(whole)::value || quad < rows.slice.count;
            float s[4], t[4];
            quad_of(rows.student, quad, there, s);
            quad_of(rows.teacher, quad, there, t);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Logits x = logits_of<BETA, TRANSFORMED>(s[i], t[i], how);
                y_s[4 * half + i] = x.y_s, y_t[4 * half + i] = x.y_t;
            }
        }
        student.add(y_s, how.bits);
        teacher.add(y_t, how.bits);
    };
    const int whole_chunks = rows.whole_chunks();
#pragma unroll 1
    for (int chunk = 0; chunk < whole_chunks; ++chunk) {
        barrier_wait(&rows.arrived[chunk], parity);
#pragma unroll
        for (int first = 0; first < CHUNK; first += 64) add(chunk * CHUNK + first, std::true_type());
    }
    if (whole_chunks < rows.chunks()) {
        barrier_wait(&rows.arrived[whole_chunks], parity);
        rows.fill_last(problem, index, lane);
#pragma unroll 1
        for (int first = whole_chunks * CHUNK; first < rows.slice.count; first += 64) add(first, std::false_type());
    }
    Part part;
    part.high_s = warp_max(student.high), part.high_t = warp_max(teacher.high);
    const float own_s = student.scaled_to(part.high_s, how.bits), own_t = teacher.scaled_to(part.high_t, how.bits);
    part.rest_s = warp_sum(own_s), part.rest_t = warp_sum(own_t);
    if (!wants_top(part)) return part;

    // The lane that has the top is summed again, by all lanes, without it.
    const int owner = __ffs(int(__ballot_sync(ALL, student.high == part.high_s))) - 1;
    const int entries = (rows.slice.count - owner + 31) / 32 * 4;
    const auto place = [&](int entry) { return 4 * (owner + entry / 4 * 32) + entry % 4; };
    const auto logits = [&](int at) { return logits_of<BETA, TRANSFORMED>(rows.student[at], rows.teacher[at], how); };
    float best = -INF;
    int top = INT_MAX;
    __syncwarp();  // that lane may have written its last quad
    for (int entry = lane; entry < entries; entry += 32) {
        const float y = logits(place(entry)).y_s;
        if (y > best) best = y, top = place(entry);
    }
    // found by its y as it is here: computed twice, a capped logit may differ in its last bit
    top = __reduce_min_sync(ALL, best == warp_max(best) ? top : INT_MAX);
    Part again = part;
    again.rest_s = lane == owner ? 0.0f : own_s, again.rest_t = lane == owner ? 0.0f : own_t;
    for (int entry = lane; entry < entries; entry += 32) {
        const Logits x = logits(place(entry));
        if (place(entry) != top) add_rest(again, x.y_s, x.y_t, how.bits);
    }
    part.rest_s = warp_sum(again.rest_s), part.rest_t = warp_sum(again.rest_t);
    const Logits x = logits(top);
    part.at_top = x.y_t, part.gap_at_top = x.gap;
    part.top = int(rows.column) + top;
    return part;
}

// B: g and p_S in place of the logits.
template <int BETA, bool CLIP, bool STATISTICS, bool TRANSFORMED>
__device__ Totals measure_slice(const Rows& rows, const Problem& problem, const Norms& norms, int lane) {
    Totals totals;
#pragma unroll 1
    for (int quad = lane; quad < rows.slice.count; quad += 32) {
        float s[4], t[4];
        quad_of(rows.student, quad, true, s);
        quad_of(rows.teacher, quad, true, t);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Logits x = logits_of<BETA, TRANSFORMED>(s[i], t[i], problem.tempering, norms.centre);
            const Direction of =
                measured<BETA, CLIP, STATISTICS>(x, norms, problem.tempering, problem.measure, totals);
            s[i] = of.g, t[i] = of.p;
        }
        set_quad(rows.student, quad, s);
        set_quad(rows.teacher, quad, t);
    }
    const int top = norms.top - int(rows.column);
    if (norms.top >= 0 && top >= 0 && top < 4 * rows.slice.count && top / 4 % 32 == lane) {
        totals.sum[Totals::DIRECTION] -= rows.student[top];  // what rounding has left of it
        rows.student[top] *= 0.0f;                           // but not of NaN
    }
    return totals;
}

// C: dz = g weight - p centre, or 0, and the next row, if there is one, in place of what it was made of. `to`: where
// the slice begins.
template <bool KEPT, class Element>
__device__ __forceinline__ void write_slice(
    const Rows& rows, const Problem& problem, Element* to, float weight, float centre, bool more, const Source& next,
    int lane
) {
    const auto quad_at = [&](int quad, float (&g)[4]) {
        float p[4];
        quad_of(rows.student, quad, true, g);
        quad_of(rows.teacher, quad, true, p);
#pragma unroll
        for (int i = 0; i < 4; ++i) g[i] = KEPT ? gradient({g[i], p[i]}, weight, centre) : 0.0f;
    };
    const int whole_chunks = problem.wide_dz && problem.bulk ? rows.whole_chunks() : 0, chunks = rows.chunks();
#pragma unroll 1
    for (int chunk = 0; chunk < whole_chunks; ++chunk) {
#pragma unroll
        for (int quad = 0; quad < CHUNK; quad += 32) {
            float g[4];
            quad_at(chunk * CHUNK + quad + lane, g);
            store_quad(to + 4 * (chunk * CHUNK + quad + lane), g);
        }
        if (more) rows.fetch_bulk(next, chunk, chunk * CHUNK * 4, CHUNK * 16, lane);
    }
#pragma unroll 1
    for (int chunk = whole_chunks; chunk < chunks; ++chunk) {
        const int end = min((chunk + 1) * CHUNK, rows.slice.count);
#pragma unroll 1
        for (int quad = chunk * CHUNK + lane; quad < end; quad += 32) {
            float g[4];
            quad_at(quad, g);
            if (problem.wide_dz && 4 * quad + 4 <= rows.columns) {
                store_quad(to + 4 * quad, g);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (4 * quad + i < rows.columns) to[4 * quad + i] = Element(g[i]);
            }
        }
        if (more) rows.fetch(problem, next, chunk, lane);
    }
}

template <int BETA, bool CLIP, bool STATISTICS, bool TRANSFORMED>
__global__ void __launch_bounds__(THREADS, 2) divergence_rows(const __grid_constant__ Problem problem) {
    Exchange& exchange = *reinterpret_cast<Exchange*>(shared_memory());
    float4* const memory = shared_memory() + EXCHANGE_QUADS;
    const DivergenceRequest& r = problem.request;
    const int blocks = cluster_blocks(), rank = cluster_rank();
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int64_t clusters = gridDim.x / blocks, first = blockIdx.x / blocks;

    Rows rows;
    rows.student = reinterpret_cast<float*>(memory + warp * problem.each);
    rows.teacher = reinterpret_cast<float*>(memory + (WARPS + warp) * problem.each);
    rows.arrived = exchange.arrived[warp];
    rows.slice = slice_of(r.vocab, blocks * WARPS, rank * WARPS + warp);
    rows.column = int64_t(rows.slice.first) * 4;
    rows.columns = int(min(int64_t(rows.slice.count) * 4, r.vocab - rows.column));
    if (rows.slice.count == 0) rows.columns = 0;
    if (lane == 0) {
        for (int chunk = 0; chunk < MOST_CHUNKS; ++chunk) barrier_init(&rows.arrived[chunk], problem.bulk ? 1 : 32);
        fence_barriers();
    }
    __syncwarp();
    const auto fetch_all = [&](int64_t index) {
        const Source from = rows.source(r, index);
#pragma unroll 1
        for (int chunk = 0; chunk < rows.chunks(); ++chunk) rows.fetch(problem, from, chunk, lane);
    };
    if (first < r.n) fetch_all(first);
    cluster_sync();

    int parity = 0;
    for (int64_t index = first; index < r.n; index += clusters, parity ^= 1) {
        // early, so that they are there when they are needed
        const int64_t target = STATISTICS && r.targets ? r.targets[index] : 0;
        const float weight = r.dz && r.row_scale ? problem.chain * r.row_scale[index] : problem.chain;
        const Part part = part_of<BETA, TRANSFORMED>(rows, problem, index, parity, lane);
        if (lane == 0) exchange.warp_parts[warp] = part;
        __syncthreads();
        if (warp == 0) {
            const Part block = joined(exchange.warp_parts[lane % WARPS], WARPS, problem.tempering.bits);
            if (lane < blocks) *in_block(&exchange.parts[rank], lane) = block;
        }
        cluster_sync();
        if (warp == 0) {
            const Part row = joined(exchange.parts[lane % blocks], blocks, problem.tempering.bits);
            const Norms norms = settled<BETA, CLIP, TRANSFORMED>(row, problem.tempering, problem.measure);
            if (lane == 0) exchange.norms = norms;
        }
        __syncthreads();
        const Norms norms = exchange.norms;

        if (STATISTICS && r.targets) {  // before its logits are gone
            const int64_t at = target - rows.column;
            const bool strange = target < 0 || target >= r.vocab;
            float* const column = r.table + index;
            if (strange && rank == 0 && threadIdx.x == 0) {
                column[STUDENT_LOGPROB * r.table_stride] = column[TEACHER_LOGPROB * r.table_stride] = NAN;
            } else if (!strange && at >= 0 && at < 4 * rows.slice.count && at / 4 % 32 == lane) {
                const Logits x = logits_of<BETA, TRANSFORMED>(rows.student[at], rows.teacher[at], problem.tempering);
                column[STUDENT_LOGPROB * r.table_stride] = (x.y_s * problem.tempering.bits - norms.log_s) * LN2;
                column[TEACHER_LOGPROB * r.table_stride] = (x.y_t * problem.tempering.bits - norms.log_t) * LN2;
            }
        }
        Totals totals = measure_slice<BETA, CLIP, STATISTICS, TRANSFORMED>(rows, problem, norms, lane);
        add_up<BETA, CLIP, STATISTICS>(totals, 32);
        if (lane == 0) exchange.warp_sums[warp] = totals;
        __syncthreads();
        if (warp == 0) {
            totals = exchange.warp_sums[lane % WARPS];
            add_up<BETA, CLIP, STATISTICS>(totals, WARPS);
            if (lane < blocks) *in_block(&exchange.sums[rank], lane) = totals;
        }
        cluster_sync();
        totals = exchange.sums[lane % blocks];
        add_up<BETA, CLIP, STATISTICS>(totals, blocks);

        const Token<float> token = token_of_row<CLIP>(totals, norms, problem.measure, problem.token_clip);
        if (rank == 0 && threadIdx.x == 0) {
            float* const column = r.table + index;
            column[LOSS * r.table_stride] = token.loss;
            if (STATISTICS) {
                column[DIVERGENCE * r.table_stride] = token.divergence;
                column[STUDENT_ENTROPY * r.table_stride] = norms.no_s ? 0.0f : totals.sum[Totals::ENTROPY_S] * LN2;
                column[TEACHER_ENTROPY * r.table_stride] = norms.no_t ? 0.0f : totals.sum[Totals::ENTROPY_T] * LN2;
                column[ENTRY_CLIPPED * r.table_stride] = norms.live() && totals.sum[Totals::OVER] > 0.0f;
                column[CLIPPED_AMOUNT * r.table_stride] = token.amount;
                column[TOKEN_CLIPPED * r.table_stride] = token.over;
            }
        }
        const int64_t next = index + clusters;
        const bool more = next < r.n;
        if (r.dz) {
            const float centre = totals.sum[Totals::DIRECTION] * weight;
            const Source source = rows.source(r, next);
            const int64_t at = index * r.dz_stride + rows.column;
            const auto write = [&](auto* dz) {
                if (token.kept) write_slice<true>(rows, problem, dz + at, weight, centre, more, source, lane);
                else write_slice<false>(rows, problem, dz + at, weight, centre, more, source, lane);
            };
            if (r.dz_type == FLOAT32) write(static_cast<float*>(r.dz));
            else if (r.dz_type == BFLOAT16) write(static_cast<bfloat16*>(r.dz));
            else write(static_cast<float16*>(r.dz));
        } else if (more) {
            fetch_all(next);
        }
    }
    cluster_sync();
}

// ------------------------------------------------------------------------------------------------- what a launch needs

using Kernel = void (*)(Problem);

template <int BETA, bool CLIP>
inline Kernel choose_flags(bool statistics, bool transformed) {
    if (statistics)
        return transformed ? divergence_rows<BETA, CLIP, true, true> : divergence_rows<BETA, CLIP, true, false>;
    return transformed ? divergence_rows<BETA, CLIP, false, true> : divergence_rows<BETA, CLIP, false, false>;
}
template <int BETA>
inline Kernel choose_clip(bool clip, bool statistics, bool transformed) {
    return (clip ? choose_flags<BETA, true> : choose_flags<BETA, false>)(statistics, transformed);
}
inline Kernel choose(double beta, bool clip, bool statistics, bool transformed) {
    if (beta == 0) return choose_clip<FORWARD>(clip, statistics, transformed);
    if (beta == 1) return choose_clip<REVERSE>(clip, statistics, transformed);
    return choose_clip<MIXTURE>(clip, statistics, transformed);
}

// Of a block's shared memory.
inline int32_t shared_bytes(int64_t vocab, int blocks) {
    return (EXCHANGE_QUADS + quads_per_worker(vocab, blocks * WARPS) * WARPS * 2) * 16;
}

template <class Number>
inline bool multiple_of(Number x, int64_t of) {
    return int64_t(x) % of == 0;
}

inline Problem problem_of(const DivergenceRequest& r, const RowMeaning& meaning, int blocks) {
    Problem p{};
    p.request = r;
    p.each = quads_per_worker(r.vocab, blocks * WARPS);
    p.tempering = meaning.tempering, p.measure = meaning.measure;
    p.token_clip = float(r.token_clip), p.chain = float(r.student_transform.scale / r.temperature);
    p.bulk = multiple_of(reinterpret_cast<intptr_t>(r.student), 16) && multiple_of(r.student_stride, 4) &&
             multiple_of(reinterpret_cast<intptr_t>(r.teacher), 16) && multiple_of(r.teacher_stride, 4);
    const int element = r.dz_type == FLOAT32 ? 4 : 2;
    p.wide_dz = multiple_of(reinterpret_cast<intptr_t>(r.dz), 4 * element) && multiple_of(r.dz_stride, 4);
    return p;
}

}  // namespace opsd
