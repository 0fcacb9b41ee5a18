// Memory of one GPU, allocated and freed in the order of a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace libsd35::cuda {

// Memory may be freed from any thread.
class MemoryPool {
  public:
    MemoryPool(int index, std::string name, cudaStream_t stream);
    // All memory has been released, and the stream has no work.
    ~MemoryPool();
    MemoryPool(const MemoryPool&) = delete;
    MemoryPool& operator=(const MemoryPool&) = delete;

    // Throws Failure where the GPU has no room.
    void* allocate(std::uint64_t bytes);
    // After what is queued.
    void release(void* address) noexcept;

    // Working memory that engines share, one running at a time; it moves when it has to grow.
    void* scratch(std::uint64_t bytes);
    std::uint64_t scratch_version() const noexcept { return scratch_version_; }
    void free_scratch() noexcept;

    // Gives what has been freed back to the driver.
    void trim();

    // While the stream is recorded: what is freed inside is freed at the end.
    void begin_recording();
    void end_recording() noexcept;

  private:
    std::string name_;
    cudaStream_t stream_;
    cudaMemPool_t pool_ = nullptr;
    std::mutex mutex_;
    bool recording_ = false;
    std::vector<void*> deferred_;
    void* scratch_ = nullptr;
    std::uint64_t scratch_bytes_ = 0;
    std::atomic<std::uint64_t> scratch_version_{0};
};

}  // namespace libsd35::cuda
