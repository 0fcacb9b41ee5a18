#include "plugin/loading.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <string>

#include "error.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

namespace fs = std::filesystem;

// sd35/ beside the library that this function is in.
fs::path own_folder() {
    Dl_info info{};
    const auto self = reinterpret_cast<const void*>(&own_folder);
    if (::dladdr(self, &info) == 0 || info.dli_fname == nullptr) return {};
    std::error_code failure;
    const fs::path library = fs::canonical(info.dli_fname, failure);
    return failure ? fs::path() : library.parent_path() / "sd35";
}

// Libraries are code: never from wherever the process happens to stand.
fs::path plugin_folder() {
    const char* named = std::getenv("SD35_BACKENDS");
    if (named == nullptr || *named == '\0') return own_folder();
    fs::path folder(named);
    if (!folder.is_absolute()) {
        throw Error(SD35_USAGE, "SD35_BACKENDS is " + shown(named) + ", no absolute path",
                    "name a directory from the root");
    }
    return folder;
}

std::string last_failure() {
    const char* reason = ::dlerror();
    return reason == nullptr ? "no reason given" : reason;
}

// What a library is needed for, and what to do where it is missing.
struct Needed {
    std::string_view file;
    std::string purpose;
    std::string install;
};

void* open_library(const Needed& needed, const fs::path& path) {
    std::error_code failure;
    if (!fs::exists(path, failure)) {
        throw Error(SD35_FAILED, needed.purpose + " need " + path.string() + ", which is missing",
                    needed.install + ", or name its directory in SD35_BACKENDS");
    }
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw Error(SD35_FAILED, path.string() + " does not load: " + last_failure(),
                    needed.install);
    }
    return library;
}

// The table that a library's function of this name returns.
template <typename Table>
const Table& load(const Needed& needed, const char* entry_name) {
    const fs::path path = plugin_folder() / needed.file;
    void* library = open_library(needed, path);
    const auto entry = reinterpret_cast<const Table* (*)()>(::dlsym(library, entry_name));
    const Table* table = entry == nullptr ? nullptr : entry();
    if (table == nullptr || table->version != SD35_PLUGIN_VERSION) {
        throw Error(SD35_FAILED, path.string() + " is of another version of libsd35",
                    "install both from one build");
    }
    return *table;
}

}  // namespace

const sd35_plugin_backend& load_backend(const BackendRow& row) {
    return load<sd35_plugin_backend>(
        {row.plugin, std::string(row.title) + " engines", std::string(row.install)},
        SD35_PLUGIN_BACKEND_ENTRY);
}

const sd35_plugin_device& load_gpu() {
    return load<sd35_plugin_device>(
        {"libsd35-cuda.so", "GPUs", "build libsd35 with -DCUDAToolkit_ROOT=DIR"},
        SD35_PLUGIN_DEVICE_ENTRY);
}

}  // namespace libsd35
