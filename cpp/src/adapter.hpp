// An adapter: a LoRA in the form that a bundle takes as inputs. docs/adapters.md specifies the
// file.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "bundle.hpp"

namespace libsd35 {

// What is added to one linear: up * down times the user's scale, float32 of the host.
struct AdapterLayer {
    Buffer down;  // [rank, in]
    Buffer up;    // [out, rank]

    std::int64_t rank() const { return down.shape()[0]; }
};

// A LoRA in memory.
struct Adapter {
    std::vector<std::pair<std::string, AdapterLayer>> layers;  // by part/layer
    std::string source;        // SHA-256 of the file that it was made from, in hex
    std::uint64_t number = 0;  // of its own among those of a pipeline

    // The largest of its layers'.
    std::int64_t rank() const;
    std::uint64_t bytes() const;
    // Whether it changes a CLIP.
    bool changes_texts() const;
};

using SharedAdapter = std::shared_ptr<const Adapter>;

// Reads an adapter, all of it. Throws Error: missing, damaged, not in this form, or not finite.
Adapter read_adapter(const std::filesystem::path& path);

// Where a bundle takes the adapters of a linear.
struct AdapterSlot {
    std::string component;
    const AdapterGroup* group;
    std::int64_t block;
    std::int64_t linear;
    std::int64_t in;
    std::int64_t out;
};

// By part/layer.
using AdapterSlots = std::map<std::string, AdapterSlot>;

// The linears that a bundle takes adapters of; its manifest outlives them.
AdapterSlots adapter_slots(const Manifest& manifest);

// Throws Error where a bundle takes no adapters.
void check_takes_adapters(const Bundle& bundle);

// Throws Error where an adapter is of another structure, or of a larger rank than the bundle takes.
void check_fits(const Adapter& adapter, const Manifest& manifest, const std::string& name);

}  // namespace libsd35
