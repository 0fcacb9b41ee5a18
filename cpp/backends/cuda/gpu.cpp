#include "gpu.hpp"

#include <algorithm>
#include <cstring>

#include "checks.hpp"

namespace libsd35::cuda {
namespace {

// Bytes of host memory through which uploads and downloads pass.
constexpr std::size_t staging_bytes = 16 << 20;

std::string name_of(int index) {
    return "cuda:" + std::to_string(index);
}

std::string reason_of(cudaError_t status) {
    int driver = 0;
    const bool none = cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0;
    return none ? "this machine has no NVIDIA driver" : cudaGetErrorString(status);
}

void check_index(int index) {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        throw Failure(SD35_FAILED, name_of(index) + " cannot be used: " + reason_of(status) +
                                       " — install the NVIDIA driver, or build for this machine "
                                       "with: sd35-trt build --gpu cpu");
    }
    if (index >= count) {
        throw Failure(SD35_FAILED, "there is no " + name_of(index) + ": this machine has " +
                                       std::to_string(count) + " GPU(s) — use cuda");
    }
}

}  // namespace

Gpu::Gpu(int index) : index_(index) {
    check_index(index);
    activate();
    std::size_t total = 0;
    check(cudaMemGetInfo(&free_at_start_, &total));
    stream_ = std::make_unique<EngineStream>(index);
    copies_ = std::make_unique<CopyStream>();
    pool_ = std::make_unique<MemoryPool>(index, name_of(index), stream());
    staging_ = std::make_unique<Pinned>(staging_bytes);
    staged_ = events_.take();
}

Gpu::~Gpu() {
    cudaSetDevice(index_);
    pool_->free_scratch();
    // Memory is freed in the order of the stream: waited for before the pool goes.
    cudaStreamSynchronize(copies_->get());
    cudaStreamSynchronize(stream());
    cudaEventDestroy(staged_);
}

void Gpu::activate() const {
    check(cudaSetDevice(index_));
}

void Gpu::upload(const char* from, char* to, std::uint64_t bytes) {
    for (std::uint64_t first = 0; first < bytes; first += staging_bytes) {
        const std::size_t count = std::min<std::uint64_t>(staging_bytes, bytes - first);
        // The piece before this one must have left the staging memory.
        check(cudaEventSynchronize(staged_));
        std::memcpy(staging_->get(), from + first, count);
        check(
            cudaMemcpyAsync(to + first, staging_->get(), count, cudaMemcpyHostToDevice, stream()));
        check(cudaEventRecord(staged_, stream()));
    }
}

void Gpu::download(const char* from, char* to, std::uint64_t bytes) {
    for (std::uint64_t first = 0; first < bytes; first += staging_bytes) {
        const std::size_t count = std::min<std::uint64_t>(staging_bytes, bytes - first);
        check(cudaEventSynchronize(staged_));
        check(cudaMemcpyAsync(staging_->get(), from + first, count, cudaMemcpyDeviceToHost,
                              stream()));
        synchronize();
        std::memcpy(to + first, staging_->get(), count);
    }
}

void Gpu::copy(const void* from, void* to, std::uint64_t bytes) {
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream()));
}

std::unique_ptr<Copy> Gpu::fetch(const void* from, void* to, std::uint64_t bytes) {
    auto copy = std::make_unique<Copy>(Copy{events_.take(), events_.take(), this});
    check(cudaEventRecord(copy->ready, stream()));
    check(cudaStreamWaitEvent(copies_->get(), copy->ready, 0));
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, copies_->get()));
    check(cudaEventRecord(copy->copied, copies_->get()));
    return copy;
}

void Gpu::wait(const Copy& copy) const {
    check(cudaEventSynchronize(copy.copied));
}

void Gpu::fence(const Copy& copy) const {
    check(cudaStreamWaitEvent(stream(), copy.copied, 0));
}

void Gpu::forget(const Copy& copy) {
    events_.give_back(copy.ready);
    events_.give_back(copy.copied);
}

void Gpu::begin_recording() {
    pool_->begin_recording();
    // Other threads may allocate meanwhile: an engine that is loaded ahead.
    const cudaError_t status = cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal);
    if (status != cudaSuccess) pool_->end_recording();
    check(status);
}

cudaGraphExec_t Gpu::end_recording(bool keep) {
    cudaGraph_t graph = nullptr;
    const cudaError_t status = cudaStreamEndCapture(stream(), &graph);
    pool_->end_recording();
    cudaGraphExec_t executable = nullptr;
    cudaError_t made = cudaSuccess;
    if (status == cudaSuccess && keep) made = cudaGraphInstantiate(&executable, graph, 0);
    if (graph != nullptr) cudaGraphDestroy(graph);
    check(status);
    check(made);
    return executable;
}

void Gpu::synchronize() const {
    check(cudaStreamSynchronize(stream()));
}

void Gpu::trim() {
    pool_->free_scratch();
    synchronize();
    pool_->trim();
}

void Gpu::memory(std::uint64_t& used, std::uint64_t& peak, std::uint64_t& total) {
    std::size_t free = 0;
    std::size_t all = 0;
    check(cudaMemGetInfo(&free, &all));
    // Others may have freed memory since.
    used = free_at_start_ > free ? free_at_start_ - free : 0;
    std::uint64_t before = peak_;
    while (before < used && !peak_.compare_exchange_weak(before, used)) {
    }
    peak = peak_;
    total = all;
}

}  // namespace libsd35::cuda
