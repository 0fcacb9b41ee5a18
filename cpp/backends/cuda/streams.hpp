// A GPU's streams, and the events between them.
#pragma once

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

namespace libsd35::cuda {

// A stream for engines, given back at the end: libraries keep a workspace for every stream that
// they have seen, so the next device of the GPU takes it again.
class EngineStream {
  public:
    explicit EngineStream(int index);
    ~EngineStream();
    EngineStream(const EngineStream&) = delete;
    EngineStream& operator=(const EngineStream&) = delete;

    cudaStream_t get() const noexcept { return stream_; }

  private:
    int index_;
    cudaStream_t stream_;
};

// A stream that copies beside the work.
class CopyStream {
  public:
    CopyStream();
    ~CopyStream();
    CopyStream(const CopyStream&) = delete;
    CopyStream& operator=(const CopyStream&) = delete;

    cudaStream_t get() const noexcept { return stream_; }

  private:
    cudaStream_t stream_ = nullptr;
};

// Events, used again when nobody waits for them any more.
class Events {
  public:
    Events() = default;
    ~Events();
    Events(const Events&) = delete;
    Events& operator=(const Events&) = delete;

    cudaEvent_t take();
    void give_back(cudaEvent_t event);

  private:
    std::mutex mutex_;
    std::vector<cudaEvent_t> idle_;
};

// Page-locked memory of the host.
class Pinned {
  public:
    explicit Pinned(std::size_t bytes);
    ~Pinned();
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;

    char* get() const noexcept { return static_cast<char*>(address_); }
    std::size_t bytes() const noexcept { return bytes_; }

  private:
    void* address_ = nullptr;
    std::size_t bytes_;
};

}  // namespace libsd35::cuda
