// The parts of the CUDA runtime that libsd35-cuda.so uses, on the host's memory.
//
// Streams are as late as CUDA lets them be: what is queued is done when somebody waits for it, on
// another stream only if an event demands it. Work that reads what should have been protected by an
// event finds it overwritten; what is used after it was freed is AddressSanitizer's to find.
//
// The environment variable FAKE_GPUS says how many GPUs there are, FAKE_GPU_BYTES how much memory
// one has.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

using Work = std::function<void()>;

struct CUstream_st {
    std::deque<Work> work;
    std::vector<Work>* recording = nullptr;
};

struct CUevent_st {
    CUstream_st* stream = nullptr;
    std::uint64_t recorded = 0;
    std::uint64_t done = 0;
};

struct CUgraph_st {
    std::vector<Work> work;
};

struct CUgraphExec_st {
    std::vector<Work> work;
};

struct CUmemPoolHandle_st {
    std::uint64_t bytes = 0;
};

namespace {

// How often a pool was trimmed.
std::atomic<int> trims{0};

constexpr int uninitialized = 0xA5;

struct Memory {
    std::mutex mutex;
    std::map<void*, std::size_t> blocks;
    std::size_t used = 0;
};

// All calls take turns, what they call back included.
std::recursive_mutex& turn() {
    static std::recursive_mutex mutex;
    return mutex;
}

Memory& memory() {
    static Memory only;
    return only;
}

std::size_t number(const char* name, std::size_t usual) {
    const char* text = std::getenv(name);
    return text == nullptr ? usual : std::strtoull(text, nullptr, 10);
}

std::size_t total_bytes() {
    return number("FAKE_GPU_BYTES", std::size_t{8} << 30);
}

void drain(CUstream_st& stream) {
    while (!stream.work.empty()) {
        const Work work = std::move(stream.work.front());
        stream.work.pop_front();
        work();
    }
}

void await(const CUevent_st& event, std::uint64_t count) {
    while (event.done < count && event.stream != nullptr && !event.stream->work.empty()) {
        const Work work = std::move(event.stream->work.front());
        event.stream->work.pop_front();
        work();
    }
}

void queue(CUstream_st& stream, Work work) {
    if (stream.recording != nullptr) {
        stream.recording->push_back(std::move(work));
    } else {
        stream.work.push_back(std::move(work));
    }
}

void free_block(void* address) {
    const std::lock_guard lock(memory().mutex);
    const auto found = memory().blocks.find(address);
    if (found == memory().blocks.end()) std::abort();  // freed twice
    memory().used -= found->second;
    memory().blocks.erase(found);
    std::free(address);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
    *count = static_cast<int>(number("FAKE_GPUS", 1));
    return *count > 0 ? cudaSuccess : cudaErrorInsufficientDriver;
}

cudaError_t cudaDriverGetVersion(int* version) {
    *version = 0;
    return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "a fake failure";
}

cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
    const std::lock_guard lock(memory().mutex);
    *total = total_bytes();
    *free = *total - memory().used;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    *stream = new CUstream_st();
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    const std::lock_guard lock(turn());
    drain(*stream);
    delete stream;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    const std::lock_guard lock(turn());
    if (stream->recording != nullptr) return cudaErrorStreamCaptureUnsupported;
    drain(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    const std::lock_guard lock(turn());
    const std::uint64_t count = event->recorded;
    queue(*stream, [event, count] { await(*event, count); });
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = new CUevent_st();
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    const std::lock_guard lock(turn());
    await(*event, event->recorded);
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    const std::lock_guard lock(turn());
    event->stream = stream;
    const std::uint64_t count = ++event->recorded;
    queue(*stream, [event, count] { event->done = count; });
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    const std::lock_guard lock(turn());
    await(*event, event->recorded);
    return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
    const std::lock_guard lock(turn());
    queue(*stream, [=] { std::memcpy(to, from, bytes); });
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, std::size_t bytes, unsigned) {
    *address = std::malloc(bytes);
    return *address == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFreeHost(void* address) {
    std::free(address);
    return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
    *pool = new CUmemPoolHandle_st();
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
    return cudaSuccess;
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, std::size_t) {
    ++trims;
    return cudaSuccess;
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
    delete pool;
    return cudaSuccess;
}

cudaError_t cudaMallocFromPoolAsync(void** address, std::size_t bytes, cudaMemPool_t,
                                    cudaStream_t stream) {
    if (stream->recording != nullptr) return cudaErrorStreamCaptureUnsupported;
    const std::lock_guard lock(memory().mutex);
    if (memory().used + bytes > total_bytes()) return cudaErrorMemoryAllocation;
    *address = std::malloc(bytes);
    std::memset(*address, uninitialized, bytes);
    memory().blocks[*address] = bytes;
    memory().used += bytes;
    return cudaSuccess;
}

cudaError_t cudaFreeAsync(void* address, cudaStream_t stream) {
    const std::lock_guard lock(turn());
    queue(*stream, [address] { free_block(address); });
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    const std::lock_guard lock(turn());
    stream->recording = new std::vector<Work>();
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    const std::lock_guard lock(turn());
    *graph = new CUgraph_st{std::move(*stream->recording)};
    delete stream->recording;
    stream->recording = nullptr;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph,
                                 unsigned long long) {
    *executable = new CUgraphExec_st{graph->work};
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete graph;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    const std::lock_guard lock(turn());
    for (const Work& work : executable->work) queue(*stream, work);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete executable;
    return cudaSuccess;
}

// For fake engines, by a name that no other library has: a real CUDA runtime may be in the process.
__attribute__((visibility("default"))) void sd35_fake_launch(void* stream, void (*function)(void*),
                                                             void* data) {
    const std::lock_guard lock(turn());
    queue(*static_cast<cudaStream_t>(stream), [=] { function(data); });
}

__attribute__((visibility("default"))) int sd35_fake_trims() {
    return trims;
}

}  // extern "C"
