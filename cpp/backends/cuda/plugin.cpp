// The functions that libsd35 finds in libsd35-cuda.so.
#include "checks.hpp"
#include "gpu.hpp"
#include "plugin/failure.hpp"

namespace {

using libsd35::guarded;
using libsd35::cuda::check;
using libsd35::cuda::Copy;
using libsd35::cuda::Gpu;

Gpu& gpu(void* device) {
    return *static_cast<Gpu*>(device);
}

int open(std::int32_t index, void** device, sd35_plugin_message* message) {
    return guarded(message, [&] { *device = std::make_unique<Gpu>(index).release(); });
}

void close(void* device) {
    const std::unique_ptr<Gpu> freed(&gpu(device));
}

int activate(void* device, sd35_plugin_message* message) {
    return guarded(message, [&] { gpu(device).activate(); });
}

void* scratch(void* device, std::uint64_t bytes) {
    void* address = nullptr;
    guarded(nullptr, [&] { address = gpu(device).pool().scratch(bytes); });
    return address;
}

sd35_plugin_place place(void* device) {
    return {1, gpu(device).index(), gpu(device).stream(), device, scratch};
}

int allocate(void* device, std::uint64_t bytes, void** address, sd35_plugin_message* message) {
    return guarded(message, [&] { *address = gpu(device).pool().allocate(bytes); });
}

void release(void* device, void* address) {
    gpu(device).pool().release(address);
}

int upload(void* device, const void* from, void* to, std::uint64_t bytes,
           sd35_plugin_message* message) {
    return guarded(message, [&] {
        gpu(device).upload(static_cast<const char*>(from), static_cast<char*>(to), bytes);
    });
}

int download(void* device, const void* from, void* to, std::uint64_t bytes,
             sd35_plugin_message* message) {
    return guarded(message, [&] {
        gpu(device).download(static_cast<const char*>(from), static_cast<char*>(to), bytes);
    });
}

int copy(void* device, const void* from, void* to, std::uint64_t bytes,
         sd35_plugin_message* message) {
    return guarded(message, [&] { gpu(device).copy(from, to, bytes); });
}

int pin(std::uint64_t bytes, void** address, sd35_plugin_message* message) {
    return guarded(message, [&] { check(cudaHostAlloc(address, bytes, cudaHostAllocDefault)); });
}

void unpin(void* address) {
    cudaFreeHost(address);
}

int fetch(void* device, const void* from, void* to, std::uint64_t bytes, void** result,
          sd35_plugin_message* message) {
    return guarded(message, [&] { *result = gpu(device).fetch(from, to, bytes).release(); });
}

int fetch_wait(void* fetched, sd35_plugin_message* message) {
    const auto& one = *static_cast<const Copy*>(fetched);
    return guarded(message, [&] { one.gpu->wait(one); });
}

int fetch_fence(void* fetched, sd35_plugin_message* message) {
    const auto& one = *static_cast<const Copy*>(fetched);
    return guarded(message, [&] { one.gpu->fence(one); });
}

void fetch_free(void* fetched) {
    const std::unique_ptr<Copy> freed(static_cast<Copy*>(fetched));
    guarded(nullptr, [&] { freed->gpu->forget(*freed); });
}

int record_begin(void* device, sd35_plugin_message* message) {
    return guarded(message, [&] { gpu(device).begin_recording(); });
}

int record_end(void* device, void** graph, sd35_plugin_message* message) {
    return guarded(message, [&] {
        const cudaGraphExec_t recorded = gpu(device).end_recording(graph != nullptr);
        if (graph != nullptr) *graph = recorded;
    });
}

int replay(void* device, void* graph, sd35_plugin_message* message) {
    return guarded(message, [&] {
        check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), gpu(device).stream()));
    });
}

void graph_free(void* graph) {
    cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph));
}

std::uint64_t scratch_version(void* device) {
    return gpu(device).pool().scratch_version();
}

int synchronize(void* device, sd35_plugin_message* message) {
    return guarded(message, [&] { gpu(device).synchronize(); });
}

int trim(void* device, sd35_plugin_message* message) {
    return guarded(message, [&] { gpu(device).trim(); });
}

int memory(void* device, std::uint64_t* used, std::uint64_t* peak, std::uint64_t* total,
           sd35_plugin_message* message) {
    return guarded(message, [&] { gpu(device).memory(*used, *peak, *total); });
}

constexpr sd35_plugin_device table{SD35_PLUGIN_VERSION,
                                   open,
                                   close,
                                   activate,
                                   place,
                                   allocate,
                                   release,
                                   upload,
                                   download,
                                   copy,
                                   pin,
                                   unpin,
                                   fetch,
                                   fetch_wait,
                                   fetch_fence,
                                   fetch_free,
                                   record_begin,
                                   record_end,
                                   replay,
                                   graph_free,
                                   scratch_version,
                                   synchronize,
                                   trim,
                                   memory};

}  // namespace

extern "C" SD35_API const sd35_plugin_device* sd35_plugin_device_v1() {
    return &table;
}
