// One GPU: its memory, its streams, graphs of what a stream was given. Equal to
// runtime/devices/cuda.py.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "memory_pool.hpp"
#include "streams.hpp"

namespace libsd35::cuda {

// A copy on its way to the host.
struct Copy {
    cudaEvent_t ready;   // recorded before it
    cudaEvent_t copied;  // recorded behind it
    class Gpu* gpu;
};

// All throw Failure.
class Gpu {
  public:
    explicit Gpu(int index);
    ~Gpu();
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    int index() const noexcept { return index_; }
    cudaStream_t stream() const noexcept { return stream_->get(); }
    MemoryPool& pool() noexcept { return *pool_; }

    void activate() const;
    void upload(const char* from, char* to, std::uint64_t bytes);
    void download(const char* from, char* to, std::uint64_t bytes);
    void copy(const void* from, void* to, std::uint64_t bytes);
    std::unique_ptr<Copy> fetch(const void* from, void* to, std::uint64_t bytes);
    void wait(const Copy& copy) const;
    void fence(const Copy& copy) const;
    void forget(const Copy& copy);
    void begin_recording();
    // NULL where it cannot be recorded and `keep` is false.
    cudaGraphExec_t end_recording(bool keep);
    void synchronize() const;
    void trim();
    void memory(std::uint64_t& used, std::uint64_t& peak, std::uint64_t& total);

  private:
    int index_;
    std::size_t free_at_start_ = 0;
    std::atomic<std::uint64_t> peak_{0};
    // In the order in which they are made; they go in the opposite one.
    std::unique_ptr<EngineStream> stream_;
    std::unique_ptr<CopyStream> copies_;
    std::unique_ptr<MemoryPool> pool_;
    std::unique_ptr<Pinned> staging_;
    Events events_;
    cudaEvent_t staged_ = nullptr;
};

}  // namespace libsd35::cuda
