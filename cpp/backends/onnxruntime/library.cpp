#include "library.hpp"

#include <dlfcn.h>
#include <sd35/sd35.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <vector>

#include "plugin/failure.hpp"
#include "text.hpp"

namespace libsd35::onnx {
namespace {

// Older ones read external data from anywhere that a file names.
constexpr std::array<int, 3> oldest{1, 24, 2};

constexpr const char* install =
    " — install ONNX Runtime 1.24.2 or newer, or name its library in SD35_ONNXRUNTIME";

// Where the build found it, or empty.
constexpr const char* built_with = SD35_ONNXRUNTIME_LIBRARY;

std::string library_path() {
    const char* named = std::getenv("SD35_ONNXRUNTIME");
    if (named != nullptr && *named != '\0') {
        if (!std::filesystem::path(named).is_absolute()) {
            throw Failure(SD35_USAGE,
                          "SD35_ONNXRUNTIME is no absolute path — name a file from the "
                          "root");
        }
        return named;
    }
    std::error_code failure;
    const bool there = *built_with != '\0' && std::filesystem::exists(built_with, failure);
    return there ? built_with : "libonnxruntime.so.1";
}

const OrtApiBase* open_base() {
    const std::string path = library_path();
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char* reason = ::dlerror();
        throw Failure(SD35_FAILED, "ONNX Runtime does not load: " +
                                       std::string(reason == nullptr ? path : reason) + install);
    }
    using Entry = const OrtApiBase* (*)();
    const auto entry = reinterpret_cast<Entry>(::dlsym(library, "OrtGetApiBase"));
    if (entry == nullptr) throw Failure(SD35_FAILED, path + " is no ONNX Runtime" + install);
    return entry();
}

// Makes the library's functions those that the C++ wrappers call; returns its version.
std::string start() {
    const OrtApiBase* base = open_base();
    const std::string version = base->GetVersionString();
    const std::vector<int> numbers = version_numbers(version);
    if (numbers < std::vector<int>(oldest.begin(), oldest.end())) {
        throw Failure(SD35_FAILED, "ONNX Runtime " + version +
                                       " is too old: it reads files that a model names from "
                                       "anywhere" +
                                       install);
    }
    const OrtApi* api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr) {
        throw Failure(SD35_FAILED, "ONNX Runtime " + version +
                                       " is older than the headers that libsd35 was built with" +
                                       install);
    }
    Ort::InitApi(api);
    return version;
}

}  // namespace

Library& Library::instance() {
    // Never destroyed: sessions may be closed while the process ends.
    static Library* const only = new Library(start());
    return *only;
}

Library::Library(std::string version)
    : version_(std::move(version)), env_(ORT_LOGGING_LEVEL_ERROR, "sd35") {}

}  // namespace libsd35::onnx
