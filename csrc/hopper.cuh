// What the cluster kernel asks of a Hopper device beyond CUDA's own functions. The tests have the same names on a CPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "row_math.h"

namespace opsd {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// ------------------------------------------------------------------------------------------------- blocks and clusters

__device__ __forceinline__ float4* shared_memory() {
    extern __shared__ float4 memory[];
    return memory;
}
__device__ __forceinline__ int cluster_blocks() { return int(cooperative_groups::this_cluster().num_blocks()); }
__device__ __forceinline__ int cluster_rank() { return int(cooperative_groups::this_cluster().block_rank()); }
// All threads of all blocks meet; what each wrote before, also to another block's shared memory, all see after.
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
// The same place in another block's shared memory.
template <class T>
__device__ __forceinline__ T* in_block(T* here, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(here, rank);
}

// ----------------------------------------------------------------------------------------------- copies, with barriers

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
__device__ __forceinline__ void copy_bulk(float* to, const float* from, int bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)
        ),
        "l"(from), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}
__device__ __forceinline__ void copy_word(float* to, const float* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Arrives at the barrier when this thread's copies of words so far are there.
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// After barrier_init: other threads' arrivals and the copy engine's find it so.
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Before a bulk copy to where this thread has read or written.
__device__ __forceinline__ void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// -------------------------------------------------------------------------------------------------------------- stores

// Four elements of dz in one store, which the compiler would not always make of them.
__device__ __forceinline__ void store_pairs(void* to, uint32_t low, uint32_t high) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(low), "r"(high) : "memory");
}
__device__ __forceinline__ void store_quad(float* to, const float (&x)[4]) {
    asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
                 : "memory");
}
__device__ __forceinline__ void store_quad(bfloat16* to, const float (&x)[4]) {
    const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]), high = __floats2bfloat162_rn(x[2], x[3]);
    store_pairs(to, bits_as<uint32_t>(low), bits_as<uint32_t>(high));
}
__device__ __forceinline__ void store_quad(float16* to, const float (&x)[4]) {
    const __half2 low = __floats2half2_rn(x[0], x[1]), high = __floats2half2_rn(x[2], x[3]);
    store_pairs(to, bits_as<uint32_t>(low), bits_as<uint32_t>(high));
}

}  // namespace opsd
