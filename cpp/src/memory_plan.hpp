// How a bundle's engines share a device's memory, by the bytes that the bundle states.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "backends.hpp"
#include "bundle.hpp"
#include "residency.hpp"

namespace libsd35 {

// Those of a bundle in the order in which a picture takes them; ControlNets' come behind the
// transformer's.
std::vector<const Component*> ordered_components(const Manifest& manifest);

// Names of ControlNets.
using Nets = std::set<std::string, std::less<>>;

// A plan by component.
struct MemoryPlan {
    std::map<std::string, Placement, std::less<>> placements;
    std::uint64_t peak_bytes;
    bool fits;
};

class MemoryPlanner {
  public:
    // `budget` is bytes of device memory; nothing is without limit.
    MemoryPlanner(const Bundle& bundle, bool on_gpu, std::optional<std::uint64_t> budget);

    // Which engines stay and which come and go; dimensions that are left out count as least, and
    // ControlNets that are not among `nets` not at all.
    MemoryPlan plan(const Dims& dims, const Nets& nets) const;

    // Throws Error where the budget is too small; names the smallest that is enough.
    MemoryPlan plan_within_budget(const Dims& dims, const Nets& nets) const;

    // Memory that a component's weights take as a whole.
    std::uint64_t weight_bytes(const Component& component) const;

    std::optional<std::uint64_t> budget() const noexcept { return budget_; }
    const std::vector<const Component*>& components() const noexcept { return components_; }

  private:
    std::uint64_t reserve(const Dims& dims) const;
    std::vector<Footprint> footprints(const Dims& dims, const Nets& nets) const;
    std::optional<std::uint64_t> stream_bytes(const Component& component) const;
    std::string streaming_advice() const;

    const Bundle& bundle_;
    const BackendRow& backend_;
    bool on_gpu_;
    std::optional<std::uint64_t> budget_;
    std::vector<const Component*> components_;
};

// Bytes of the matrices that a component takes of adapters of together this rank, padded.
std::uint64_t adapter_bytes(const Component& component, std::int64_t rank);

// Memory that an engine takes beside its weights while it runs; 0 where nothing is known.
std::uint64_t working_bytes(const Component& component, const Dims& dims);

}  // namespace libsd35
