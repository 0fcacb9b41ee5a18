#include "memory_pool.hpp"

#include <algorithm>
#include <limits>

#include "checks.hpp"
#include "text.hpp"

namespace libsd35::cuda {
namespace {

cudaMemPoolProps properties(int index) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = index;
    return properties;
}

}  // namespace

MemoryPool::MemoryPool(int index, std::string name, cudaStream_t stream)
    : name_(std::move(name)), stream_(stream) {
    const cudaMemPoolProps own = properties(index);
    check(cudaMemPoolCreate(&pool_, &own));
    // Freed buffers stay with the pool until the device is closed: steps of one size come after
    // each other.
    std::uint64_t threshold = std::numeric_limits<std::uint64_t>::max();
    check(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &threshold));
}

MemoryPool::~MemoryPool() {
    cudaMemPoolDestroy(pool_);
}

void* MemoryPool::allocate(std::uint64_t bytes) {
    void* address = nullptr;
    const cudaError_t status =
        cudaMallocFromPoolAsync(&address, std::max<std::uint64_t>(bytes, 1), pool_, stream_);
    if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        throw Failure(SD35_OUT_OF_MEMORY,
                      name_ + " has no room for " + format_bytes(static_cast<double>(bytes)) +
                          " more — draw a smaller size or batch, or load with a vram_budget");
    }
    check(status);
    return address;
}

void MemoryPool::release(void* address) noexcept {
    {
        const std::lock_guard lock(mutex_);
        if (recording_) {  // the graph would free it in every replay
            deferred_.push_back(address);
            return;
        }
    }
    cudaFreeAsync(address, stream_);
}

void* MemoryPool::scratch(std::uint64_t bytes) {
    if (bytes > scratch_bytes_) {
        free_scratch();
        scratch_ = allocate(bytes);
        scratch_bytes_ = bytes;
        ++scratch_version_;
    }
    return scratch_;
}

void MemoryPool::free_scratch() noexcept {
    if (scratch_ == nullptr) return;
    release(scratch_);
    scratch_ = nullptr;
    scratch_bytes_ = 0;
    ++scratch_version_;
}

void MemoryPool::trim() {
    check(cudaMemPoolTrimTo(pool_, 0));
}

void MemoryPool::begin_recording() {
    const std::lock_guard lock(mutex_);
    recording_ = true;
}

void MemoryPool::end_recording() noexcept {
    std::vector<void*> deferred;
    {
        const std::lock_guard lock(mutex_);
        recording_ = false;
        deferred.swap(deferred_);
    }
    for (void* address : deferred) release(address);
}

}  // namespace libsd35::cuda
