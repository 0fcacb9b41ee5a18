#include "library.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "plugin/failure.hpp"
#include "text.hpp"

namespace libsd35::trt {
namespace {

constexpr const char* install = " — install TensorRT, or name its libnvinfer.so in SD35_TENSORRT";

std::string library_path() {
    const char* named = std::getenv("SD35_TENSORRT");
    if (named == nullptr || *named == '\0') {
        return "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
    }
    if (!std::filesystem::path(named).is_absolute()) {
        throw Failure(SD35_USAGE, "SD35_TENSORRT is no absolute path — name a file from the root");
    }
    return named;
}

// 100600 is 10.6.0.
std::string version_text(std::int32_t number) {
    return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
           std::to_string(number % 100);
}

void* function(void* library, const char* name) {
    void* found = ::dlsym(library, name);
    if (found == nullptr) {
        throw Failure(SD35_FAILED, library_path() + " is no TensorRT: it has no " + name + install);
    }
    return found;
}

}  // namespace

void Log::log(Severity severity, const char* message) noexcept {
    if (severity > Severity::kERROR) return;
    try {
        const std::lock_guard lock(mutex_);
        errors_.push_back(one_line(message));
    } catch (const std::exception&) {
        // Without memory for a reason, there is none.
    }
}

std::string Log::reasons() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> unique;
    for (const std::string& error : errors_) {
        if (std::find(unique.begin(), unique.end(), error) == unique.end()) {
            unique.push_back(error);
        }
    }
    return unique.empty() ? "it gives no reason" : join(unique, "; ");
}

const Library& Library::instance() {
    // Never destroyed: engines may be closed while the process ends.
    static const Library* const only = new Library();
    return *only;
}

Library::Library() {
    const std::string path = library_path();
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = ::dlerror();
        throw Failure(SD35_FAILED, "TensorRT does not load: " +
                                       std::string(reason == nullptr ? path : reason) + install);
    }
    using Version = std::int32_t (*)();
    const std::int32_t number =
        reinterpret_cast<Version>(function(library, "getInferLibVersion"))();
    version_ = version_text(number);
    // Newer ones of the same major version have all that older ones have.
    if (number / 10000 != NV_TENSORRT_MAJOR || number < NV_TENSORRT_VERSION) {
        throw Failure(SD35_FAILED, "TensorRT " + version_ + " does not serve: this was built for " +
                                       version_text(NV_TENSORRT_VERSION) + " and newer ones of " +
                                       std::to_string(NV_TENSORRT_MAJOR) + install);
    }
    create_ = reinterpret_cast<Create>(function(library, "createInferRuntime_INTERNAL"));
}

nvinfer1::IRuntime* Library::create_runtime(Log& log) const {
    auto* runtime = static_cast<nvinfer1::IRuntime*>(create_(&log, NV_TENSORRT_VERSION));
    if (runtime == nullptr) {
        throw Failure(SD35_FAILED, "TensorRT " + version_ + " does not start: " + log.reasons() +
                                       " — check the driver with: nvidia-smi");
    }
    return runtime;
}

}  // namespace libsd35::trt
