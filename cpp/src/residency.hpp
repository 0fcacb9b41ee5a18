// Which engines stay in device memory, which are loaded for their stage, and which stream: a pure
// function of byte counts and a budget, equal to sd35_trt/residency.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace libsd35 {

// What the planner needs to know of one engine; see sd35_trt.residency.Footprint.
struct Footprint {
    std::string name;
    std::uint64_t weight_bytes;
    std::uint64_t activation_bytes;
    std::uint64_t runs = 1;
    std::optional<std::uint64_t> stream_bytes;
    bool keeps_activations = false;
    bool every_step = false;  // in turn with others that do: all of these are resident, or none
};

enum class Residence { resident, loaded, streamed };

const char* name_of(Residence residence);

// Where an engine's weights are; bytes as in sd35_trt.residency.Placement.
struct Placement {
    Residence kind;
    std::uint64_t device_bytes;
    std::uint64_t bus_bytes;
    std::uint64_t peak_bytes;
};

struct Residency {
    std::vector<Placement> placements;  // in the order of the engines
    std::uint64_t resident_bytes;
    std::uint64_t bus_bytes;
    std::uint64_t peak_bytes;
    bool fits;
};

// The plan that moves the fewest bytes per picture within a budget; where none fits, the one with
// the lowest peak. Engines run one after another, in the order given; at most 20 of them, those of
// every step counted once.
Residency plan_residency(const std::vector<Footprint>& engines, std::optional<std::uint64_t> budget,
                         std::uint64_t reserve);

}  // namespace libsd35
