// The kinds of engine, one row each: the facts of sd35_trt/backends.py that drawing needs.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

#include "bundle.hpp"

namespace libsd35 {

struct BackendRow {
    std::string_view name;     // as the manifest has it
    std::string_view title;    // of its library in messages
    std::string_view plugin;   // the shared library beside libsd35
    std::string_view install;  // what to do where the plug-in is missing
    bool on_cpu;
    bool on_cuda;
    bool streams;                 // weights, where the bundle was built for it
    bool keeps_denoiser_room;     // the denoiser's working memory stays its own when it has run
    std::uint64_t context_bytes;  // of the GPU's memory, beside the engines
};

inline constexpr std::array<BackendRow, 2> backends{{
    {"onnxruntime", "ONNX Runtime", "libsd35-onnxruntime.so",
     "build libsd35 with -Donnxruntime_ROOT=DIR", true, true, false, true, 400'000'000},
    {"tensorrt", "TensorRT", "libsd35-tensorrt.so", "build libsd35 with -DTENSORRT_ROOT=DIR", false,
     true, true, false, 900'000'000},
}};

// NULL where there is no such kind here.
const BackendRow* find_backend(std::string_view name);

// Refuses a bundle that holds engines of a kind unknown here. Throws Error.
void check_engines(const Bundle& bundle);

// The kind of a bundle's engines. Throws Error where it is unknown here.
const BackendRow& backend_of(const Bundle& bundle);

// Name of the device that a bundle's engines run on; empty asks for the usual one. Throws Error
// where they do not run there.
std::string device_of(const Bundle& bundle, std::string_view asked);

}  // namespace libsd35
