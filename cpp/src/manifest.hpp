// The manifest of a bundle, as docs/bundle-format.md specifies it.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "dtype.hpp"

namespace libsd35 {

using Bounds = std::pair<std::int64_t, std::int64_t>;

// Sizes of dynamic dimensions, by name.
using Dims = std::map<std::string, std::int64_t, std::less<>>;

// One input or output of a component.
struct Port {
    std::string name;
    DType dtype;
    // A text is a dynamic dimension.
    std::vector<std::variant<std::int64_t, std::string>> shape;

    // The shape with the dynamic dimensions filled in. Throws Error where `dims` lacks one.
    Shape resolve(const Dims& dims) const;
};

struct File {
    std::string path;
    std::uint64_t bytes;
    std::string sha256;
};

// Linears whose adapters are two inputs of a component.
struct AdapterGroup {
    std::string down;  // the input with A [blocks, in, linears, rank]
    std::string up;    // and B [blocks, linears, rank, out]
    // Of each block, the names of its linears in the checkpoint's part.
    std::vector<std::vector<std::string>> layers;
};

// One engine.
struct Component {
    std::string name;
    std::string engine;
    std::vector<File> files;
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::uint64_t weight_bytes;
    std::map<std::string, std::uint64_t> precisions;
    std::optional<std::uint64_t> activation_bytes;
    std::optional<std::uint64_t> allocated_bytes;
    std::map<std::string, Bounds, std::less<>> bounds;
    std::optional<std::uint64_t> largest_layer_bytes;
    std::vector<AdapterGroup> adapters;

    // NULL where there is no such port.
    const Port* input(std::string_view port) const;
    const Port* output(std::string_view port) const;
};

// A ControlNet of the bundle.
struct ControlRecord {
    std::string name;
    std::string kind;               // of its pictures, such as "canny"
    std::array<float, 3> encoding;  // what vae_encoder is given for them
};

struct TokenizerRecord {
    std::string path;
    std::int64_t length;
    std::int64_t pad_id;
};

struct Ranges {
    Bounds batch;
    Bounds size;
    std::int64_t size_step;
    Bounds t5_tokens;

    // Whether engines with these ranges accept all that engines with the other do.
    bool include(const Ranges& other) const;
};

struct Defaults {
    std::int64_t steps;
    double guidance;
    std::int64_t width;
    std::int64_t height;
    std::string sampler;
    std::int64_t t5_tokens;
};

struct Manifest {
    std::int64_t format;
    std::string model;
    std::string variant;
    std::string target;
    std::string builder;
    std::string policy;
    bool all_fp32;  // whether every rule of the policy says so
    Ranges ranges;
    std::int64_t latent_channels;
    std::int64_t latent_scale;
    bool guided;
    double shift;
    double train_timesteps;
    Defaults defaults;
    std::map<std::string, TokenizerRecord, std::less<>> tokenizers;
    std::vector<Component> components;
    std::vector<File> files;
    std::map<std::string, std::string, std::less<>> versions;
    bool weight_streaming;
    std::vector<std::string> compute_capabilities;
    std::set<std::string> required;
    bool inpainting;           // whether a step keeps what a mask leaves of a picture
    bool skip_layer_guidance;  // whether a step can compute a third branch
    std::vector<std::int64_t> adapter_ranks;  // that adapters are padded to, ascending
    std::vector<ControlRecord> controls;
    bool takes_controls;  // whether a step takes what ControlNets make

    // NULL where the model has none: a checkpoint without T5.
    const Component* component(std::string_view name) const;
    // NULL where there is no such ControlNet.
    const ControlRecord* control(std::string_view name) const;
};

// The input of a component with what ControlNets make.
inline constexpr std::string_view residuals_port = "residuals";

// Reads and checks the manifest of the bundle in a directory. Throws Error.
Manifest read_manifest(const std::filesystem::path& root);

}  // namespace libsd35
