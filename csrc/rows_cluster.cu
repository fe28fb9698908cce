// The cluster kernel's host side: how many blocks take a row, and the launch. See cluster_kernel.cuh.
#include <algorithm>

#include "hopper.cuh"

#include "cluster_kernel.cuh"

namespace opsd {

// The fewest blocks that leave room for two on a multiprocessor, or for one; more where there are few tokens.
static int cluster_size(int64_t n, int64_t vocab, int processors, int bytes_for_two) {
    int blocks = 1;
    while (blocks < LARGEST_CLUSTER && shared_bytes(vocab, blocks) > bytes_for_two) blocks *= 2;
    while (blocks < LARGEST_CLUSTER && n * blocks < 2 * int64_t(processors)) blocks *= 2;
    return blocks;
}

}  // namespace opsd

extern "C" {

// The most columns that a cluster can hold.
int64_t opsd_cluster_most_columns() {
    return int64_t(opsd::MOST_CHUNKS) * opsd::CHUNK * 4 * opsd::WARPS * opsd::LARGEST_CLUSTER;
}

// What a block of a cluster of `blocks` takes of its multiprocessor.
int opsd_cluster_shared_bytes(int64_t vocab, int blocks) { return opsd::shared_bytes(vocab, blocks); }

const char* opsd_cluster_error(int code) { return cudaGetErrorString(cudaError_t(code)); }

// Pointers are the device's; enqueued on `stream` of the device. Returns a cudaError_t.
int opsd_cluster_divergence_rows(const opsd::DivergenceRequest* request, int device, cudaStream_t stream) {
    using namespace opsd;
    const DivergenceRequest& r = *request;
    const RowMeaning meaning = meaning_of(r);
    const Kernel kernel = choose(r.beta, r.entry_clip < double(INF), r.statistics != 0, meaning.transformed);
    int processors = 0, most_block = 0, most_processor = 0;
    cudaError_t error = cudaSetDevice(device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error) error = cudaDeviceGetAttribute(&most_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaDeviceGetAttribute(&most_processor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    if (error) return error;
    constexpr int RESERVED = 1024;  // of each block, by the system
    const int blocks = cluster_size(r.n, r.vocab, processors, most_processor / 2 - RESERVED);
    const Problem problem = problem_of(r, meaning, blocks);
    const int bytes = shared_bytes(r.vocab, blocks);
    if (bytes > most_block || problem.each > MOST_CHUNKS * CHUNK) return cudaErrorInvalidValue;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (!error)
        error = cudaFuncSetAttribute(
            kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared
        );
    if (!error) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error) return error;

    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(blocks), attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(unsigned(blocks)), launch.blockDim = dim3(THREADS);
    launch.dynamicSmemBytes = size_t(bytes), launch.stream = stream;
    launch.attrs = &attribute, launch.numAttrs = 1;
    int at_once = 0;
    error = cudaOccupancyMaxActiveClusters(&at_once, kernel, &launch);
    if (error) return error;
    if (at_once < 1) return cudaErrorLaunchOutOfResources;
    launch.gridDim.x = unsigned(std::min<int64_t>(at_once, r.n) * blocks);
    return cudaLaunchKernelEx(&launch, kernel, problem);
}
}
