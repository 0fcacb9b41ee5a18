#include "streams.hpp"

#include <map>

#include "checks.hpp"

namespace libsd35::cuda {
namespace {

// Streams of devices that were closed, by GPU.
struct Idle {
    std::mutex mutex;
    std::map<int, std::vector<cudaStream_t>> streams;
};

Idle& idle() {
    // Never destroyed: devices may be closed while the process ends.
    static Idle* const only = new Idle();
    return *only;
}

cudaStream_t create_stream() {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return stream;
}

cudaStream_t take_stream(int index) {
    {
        const std::lock_guard lock(idle().mutex);
        std::vector<cudaStream_t>& streams = idle().streams[index];
        if (!streams.empty()) {
            const cudaStream_t stream = streams.back();
            streams.pop_back();
            return stream;
        }
    }
    return create_stream();
}

}  // namespace

EngineStream::EngineStream(int index) : index_(index), stream_(take_stream(index)) {}

EngineStream::~EngineStream() {
    const std::lock_guard lock(idle().mutex);
    idle().streams[index_].push_back(stream_);
}

CopyStream::CopyStream() : stream_(create_stream()) {}

CopyStream::~CopyStream() {
    cudaStreamDestroy(stream_);
}

Events::~Events() {
    for (const cudaEvent_t event : idle_) cudaEventDestroy(event);
}

cudaEvent_t Events::take() {
    {
        const std::lock_guard lock(mutex_);
        if (!idle_.empty()) {
            const cudaEvent_t event = idle_.back();
            idle_.pop_back();
            return event;
        }
    }
    cudaEvent_t event = nullptr;
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    return event;
}

void Events::give_back(cudaEvent_t event) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(event);
}

Pinned::Pinned(std::size_t bytes) : bytes_(bytes) {
    check(cudaHostAlloc(&address_, bytes, cudaHostAllocDefault));
}

Pinned::~Pinned() {
    cudaFreeHost(address_);
}

}  // namespace libsd35::cuda
