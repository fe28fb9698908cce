// The cluster kernel itself, csrc/cluster_kernel.cuh, on a CPU: a thread of the device is a coroutine, all of one
// cluster's take turns in one thread of the host, and wait for each other where the kernel says so.
//
// A bulk copy happens at one of two extremes: at once, or not before a thread waits for it. What reads too early or
// too late is wrong in one of them.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "row_parts.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace opsd {

using std::max;
using std::min;

// ---------------------------------------------------------------------------------------------------------- coroutines

struct Index {
    unsigned x;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static Index threadIdx, blockIdx, gridDim;

// A meeting of `size` threads: the last to come lets the others go.
struct Meeting {
    int size = 0, here = 0;
    uint64_t round = 0;
};

struct Warp {
    Meeting meeting;
    uint32_t words[32];
};

struct Block {
    Meeting meeting;
    std::vector<Warp> warps;
    std::vector<float4> memory;
};

struct Cluster {
    Meeting meeting;
    std::vector<Block> blocks;
};

struct Coroutine {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    jmp_buf point;  // where it is, once it has begun: a jump, unlike a change of contexts, makes no system call
    int block, thread;
    bool begun = false, done = false;
};

static Cluster* cluster;
static Coroutine* current;
static jmp_buf scheduler;
static uint64_t progress;  // whatever may let someone go on counts

[[noreturn]] static void fail(const char* what) {
    fprintf(stderr, "the kernel %s\n", what);
    abort();
}
static void yield() {
    if (!_setjmp(current->point)) _longjmp(scheduler, 1);
}
// Until it yields or ends.
static __attribute__((noinline)) void resume(Coroutine& thread) {
    if (_setjmp(scheduler)) return;
    current = &thread;
    if (thread.begun) _longjmp(thread.point, 1);
    thread.begun = true;
    setcontext(&thread.context);
}
static void meet(Meeting& meeting) {
    const uint64_t round = meeting.round;
    ++progress;
    if (++meeting.here == meeting.size) {
        meeting.here = 0;
        ++meeting.round;
    }
    while (meeting.round == round) yield();
}

static Block& own_block() { return cluster->blocks[size_t(current->block)]; }
static Warp& own_warp() { return own_block().warps[size_t(current->thread / 32)]; }

// Every lane's word, as it was when all had come.
static const uint32_t* exchanged(uint32_t word, uint32_t (&seen)[32]) {
    Warp& warp = own_warp();
    warp.words[current->thread % 32] = word;
    meet(warp.meeting);
    memcpy(seen, warp.words, sizeof(seen));
    meet(warp.meeting);
    return seen;
}

// -------------------------------------------------------------------------------------------- what CUDA has of its own

inline void __syncwarp() { meet(own_warp().meeting); }
inline void __syncthreads() { meet(own_block().meeting); }
template <class T>
T __shfl_xor_sync(unsigned, T x, int distance) {
    uint32_t seen[32];
    return bits_as<T>(exchanged(bits_as<uint32_t>(x), seen)[current->thread % 32 ^ distance]);
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    uint32_t seen[32];
    return bits_as<T>(exchanged(bits_as<uint32_t>(x), seen)[lane]);
}
inline unsigned __ballot_sync(unsigned, bool x) {
    uint32_t seen[32];
    exchanged(x, seen);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= seen[lane] << lane;
    return votes;
}
inline int __reduce_min_sync(unsigned, int x) {
    uint32_t seen[32];
    exchanged(uint32_t(x), seen);
    return int(*std::min_element(seen, seen + 32, [](uint32_t a, uint32_t b) { return int(a) < int(b); }));
}
inline int __ffs(int x) { return __builtin_ffs(x); }

// ------------------------------------------------------------------------------------- what hopper.cuh has on a device

inline float4* shared_memory() { return own_block().memory.data(); }
inline int cluster_blocks() { return int(cluster->blocks.size()); }
inline int cluster_rank() { return current->block; }
inline void cluster_sync() { meet(cluster->meeting); }
template <class T>
T* in_block(T* here, int rank) {
    const auto offset = reinterpret_cast<char*>(here) - reinterpret_cast<char*>(own_block().memory.data());
    return reinterpret_cast<T*>(reinterpret_cast<char*>(cluster->blocks[size_t(rank)].memory.data()) + offset);
}

// A barrier in the eight bytes of the device's: arrivals that a phase takes, those still to come, the phase's parity,
// bytes that are awaited. Copies that wait for someone to need them are in a list beside it.
struct Barrier {
    uint8_t arrivals, to_come, parity, unused;
    int32_t bytes;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t), "in its place");
struct Copy {
    float* to;
    const float* from;
    int bytes;
    uint64_t* barrier;
};
static bool late;
static std::vector<Copy> copies;

static Barrier read_barrier(const uint64_t* at) { return bits_as<Barrier>(*at); }
static void settle_barrier(uint64_t* at, Barrier barrier) {
    if (barrier.bytes < 0) fail("copied more than it had announced");
    ++progress;
    if (!barrier.to_come && !barrier.bytes) barrier.to_come = barrier.arrivals, barrier.parity ^= 1;
    *at = bits_as<uint64_t>(barrier);
}
static void complete(const Copy& copy) {
    memcpy(copy.to, copy.from, size_t(copy.bytes));
    Barrier barrier = read_barrier(copy.barrier);
    barrier.bytes -= copy.bytes;
    settle_barrier(copy.barrier, barrier);
}

inline void barrier_init(uint64_t* at, int arrivals) {
    *at = bits_as<uint64_t>(Barrier{uint8_t(arrivals), uint8_t(arrivals), 0, 0, 0});
}
inline void fence_barriers() {}
inline void fence_copies() {}
static void arrive(uint64_t* at, int bytes) {
    Barrier barrier = read_barrier(at);
    if (!barrier.to_come) fail("arrived at a barrier too often");
    --barrier.to_come;
    barrier.bytes += bytes;
    settle_barrier(at, barrier);
}
inline void barrier_expect(uint64_t* at, int bytes) { arrive(at, bytes); }
inline void barrier_wait(uint64_t* at, int parity) {
    for (size_t i = 0; i < copies.size();) {
        if (copies[i].barrier != at) {
            ++i;
            continue;
        }
        complete(copies[i]);
        copies.erase(copies.begin() + long(i));
    }
    while (read_barrier(at).parity == parity) yield();  // parity 0: of the first phase, which ends as 1 begins
}
inline void copy_bulk(float* to, const float* from, int bytes, uint64_t* barrier) {
    if (bytes % 16 || uintptr_t(to) % 16 || uintptr_t(from) % 16) fail("copied in bulk what is not so placed");
    if (late) copies.push_back({to, from, bytes, barrier});
    else complete({to, from, bytes, barrier});
}
inline void copy_word(float* to, const float* from) { *to = *from; }
inline void arrive_after_copies(uint64_t* barrier) { arrive(barrier, 0); }

struct bfloat16 {
    uint16_t bits;
    explicit bfloat16(float x) {
        const uint32_t u = bits_as<uint32_t>(x);
        bits = uint16_t(x == x ? (u + 0x7fffu + ((u >> 16) & 1u)) >> 16 : 0x7fc0u);
    }
};
struct float16 {  // rounded as by way of an integer: a finite number below the largest float16
    uint16_t bits;
    explicit float16(float x) {
        const float size = std::fabs(x);
        const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
        const int digits = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // may carry into the exponent
        const int value = size < 0x1p-14f ? digits : ((exponent + 14) << 10) + digits;
        bits = uint16_t(value | (std::signbit(x) ? 0x8000 : 0));
    }
};
template <class Element>
void store_quad(Element* to, const float (&x)[4]) {
    if (uintptr_t(to) % (4 * sizeof(Element))) fail("stored four elements at once where they are not so placed");
    for (int i = 0; i < 4; ++i) to[i] = Element(x[i]);
}

}  // namespace opsd

#include "cluster_kernel.cuh"

namespace opsd {

static std::function<void()> body;
static void enter() {
    body();
    current->done = true;
    _longjmp(scheduler, 1);
}

// One cluster of a grid of `clusters`.
static void run(const Problem& problem, Kernel kernel, int blocks, int clusters, int which) {
    constexpr size_t STACK = 64 << 10;
    Cluster all;
    all.meeting.size = blocks * THREADS;
    all.blocks.resize(size_t(blocks));
    for (Block& block : all.blocks) {
        block.meeting.size = THREADS;
        block.warps.resize(WARPS);
        for (Warp& warp : block.warps) warp.meeting.size = 32;
        const float nan = std::nanf("");
        block.memory.assign(size_t(shared_bytes(problem.request.vocab, blocks)) / 16, float4{nan, nan, nan, nan});
    }
    cluster = &all;
    copies.clear();
    body = [&] { kernel(problem); };
    std::vector<Coroutine> threads(size_t(blocks * THREADS));
    for (size_t i = 0; i < threads.size(); ++i) {
        Coroutine& thread = threads[i];
        thread.block = int(i) / THREADS, thread.thread = int(i) % THREADS;
        thread.stack.reset(new char[STACK]);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get(), thread.context.uc_stack.ss_size = STACK;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, enter, 0);
    }
    gridDim.x = unsigned(blocks * clusters);
    for (size_t left = threads.size(); left;) {
        const uint64_t before = progress;
        for (Coroutine& thread : threads) {
            if (thread.done) continue;
            threadIdx.x = unsigned(thread.thread), blockIdx.x = unsigned(which * blocks + thread.block);
            resume(thread);
            left -= thread.done, progress += thread.done;
        }
        if (progress == before) fail("waits for what does not come");
    }
    if (!copies.empty()) fail("ended before a copy that it had begun");
}

}  // namespace opsd

// As opsd_cluster_divergence_rows, with clusters of `blocks`, `clusters` of them; late: when bulk copies happen.
extern "C" void cluster_rows_on_host(const opsd::DivergenceRequest* request, int blocks, int clusters, int late) {
    using namespace opsd;
    const DivergenceRequest& r = *request;
    const RowMeaning meaning = meaning_of(r);
    const Problem problem = problem_of(r, meaning, blocks);
    opsd::late = late;
    const Kernel kernel = choose(r.beta, r.entry_clip < double(INF), r.statistics != 0, meaning.transformed);
    for (int which = 0; which < clusters; ++which) run(problem, kernel, blocks, clusters, which);
}
