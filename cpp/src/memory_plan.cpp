#include "memory_plan.hpp"

#include <algorithm>
#include <array>

#include "components.hpp"
#include "error.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

// Dimensions that every tensor of a component grows with, texts and steps excepted.
constexpr std::array<std::string_view, 6> scaling{"batch", "samples",      "height",
                                                  "width", "image_height", "image_width"};

constexpr std::array<std::string_view, 7> usual_order{
    "clip_l", "clip_g", "t5", "vae_encoder", "conditioner", "denoiser", "vae_decoder"};

// TensorRT streams through two buffers: a layer computes from one while the next fills the other.
constexpr std::uint64_t stream_buffers = 2;

bool is_text_encoder(std::string_view name) {
    return name == "clip_l" || name == "clip_g" || name == "t5";
}

// To what format_memory shows in full: a tenth of a megabyte or of a gigabyte.
std::uint64_t round_up(std::uint64_t count) {
    const std::uint64_t unit = count >= 1'000'000'000 ? 100'000'000 : 100'000;
    return (count + unit - 1) / unit * unit;
}

MemoryPlan by_component(const std::vector<Footprint>& engines, const Residency& residency) {
    MemoryPlan plan{{}, residency.peak_bytes, residency.fits};
    for (std::size_t i = 0; i < engines.size(); ++i) {
        plan.placements.emplace(engines[i].name, residency.placements[i]);
    }
    return plan;
}

bool can_stream(const Bundle& bundle, const Component& component) {
    const BackendRow* row = find_backend(component.engine);
    return row != nullptr && row->streams && bundle.manifest().weight_streaming;
}

}  // namespace

std::vector<const Component*> ordered_components(const Manifest& manifest) {
    std::vector<const Component*> ordered;
    for (const std::string_view name : usual_order) {
        if (const Component* own = manifest.component(name)) ordered.push_back(own);
        if (name != "conditioner" && name != "denoiser") continue;
        for (const Component& one : manifest.components) {
            const bool in_loop = runs_every_step(one.name);
            if (control_name(one.name) && in_loop == (name == "denoiser")) ordered.push_back(&one);
        }
    }
    return ordered;
}

std::uint64_t working_bytes(const Component& component, const Dims& dims) {
    double share = 1.0;
    const bool batched = component.bounds.count("batch") != 0;
    for (const auto& [name, bounds] : component.bounds) {
        if (std::find(scaling.begin(), scaling.end(), name) == scaling.end()) continue;
        // A ControlNet's samples are those of its batch.
        if (name == "samples" && batched) continue;
        const auto found = dims.find(name);
        const std::int64_t size = found == dims.end() ? bounds.first : found->second;
        if (bounds.second > 0) {
            share *= static_cast<double>(std::min(size, bounds.second)) /
                     static_cast<double>(bounds.second);
        }
    }
    const auto most = static_cast<double>(component.activation_bytes.value_or(0));
    return static_cast<std::uint64_t>(share * most);
}

std::uint64_t adapter_bytes(const Component& component, std::int64_t rank) {
    std::uint64_t bytes = 0;
    for (const AdapterGroup& group : component.adapters) {
        for (const std::string& name : {group.down, group.up}) {
            const Port& port = *component.input(name);
            bytes += byte_count(port.resolve({{"rank", rank}}), port.dtype);
        }
    }
    return bytes;
}

MemoryPlanner::MemoryPlanner(const Bundle& bundle, bool on_gpu, std::optional<std::uint64_t> budget)
    : bundle_(bundle),
      backend_(backend_of(bundle)),
      on_gpu_(on_gpu),
      budget_(budget),
      components_(ordered_components(bundle.manifest())) {}

MemoryPlan MemoryPlanner::plan(const Dims& dims, const Nets& nets) const {
    const std::vector<Footprint> engines = footprints(dims, nets);
    return by_component(engines, plan_residency(engines, budget_, reserve(dims)));
}

MemoryPlan MemoryPlanner::plan_within_budget(const Dims& dims, const Nets& nets) const {
    MemoryPlan best = plan(dims, nets);
    if (!budget_ || best.fits) return best;
    const std::uint64_t smallest =
        plan_residency(footprints(dims, nets), 0, reserve(dims)).peak_bytes;
    throw Error(
        SD35_OUT_OF_MEMORY,
        bundle_.root().string() + " does not fit in " + format_memory(*budget_) + " at this size",
        "the smallest vram_budget for it is " + format_memory(round_up(smallest)) +
            streaming_advice());
}

std::uint64_t MemoryPlanner::weight_bytes(const Component& component) const {
    const std::uint64_t allocated = component.allocated_bytes.value_or(0);
    return on_gpu_ && allocated != 0 ? allocated : component.weight_bytes;
}

// What is in memory besides engines: the backend's own, and adapters.
std::uint64_t MemoryPlanner::reserve(const Dims& dims) const {
    const auto rank = dims.find("rank");
    std::uint64_t bytes = on_gpu_ ? backend_.context_bytes : 0;
    for (const Component* component : components_) {
        bytes += adapter_bytes(*component, rank == dims.end() ? 1 : rank->second);
    }
    return bytes;
}

std::vector<Footprint> MemoryPlanner::footprints(const Dims& dims, const Nets& nets) const {
    // A text encoder's batch is of texts.
    Dims texts = dims;
    if (const auto samples = dims.find("samples"); samples != dims.end()) {
        texts["batch"] = samples->second;
    }
    const auto steps = static_cast<std::uint64_t>(bundle_.manifest().defaults.steps);
    std::vector<Footprint> engines;
    for (const Component* component : components_) {
        const auto net = control_name(component->name);
        if (net && nets.count(*net) == 0) continue;
        const bool in_loop = runs_every_step(component->name);
        const BackendRow* row = find_backend(component->engine);
        engines.push_back(
            {component->name, weight_bytes(*component),
             working_bytes(*component, is_text_encoder(component->name) ? texts : dims),
             in_loop ? steps : 1, stream_bytes(*component),
             component->name == "denoiser" && row != nullptr && row->keeps_denoiser_room, in_loop});
    }
    return engines;
}

std::optional<std::uint64_t> MemoryPlanner::stream_bytes(const Component& component) const {
    if (!component.largest_layer_bytes || !can_stream(bundle_, component)) return std::nullopt;
    return std::min(stream_buffers * *component.largest_layer_bytes, component.weight_bytes);
}

std::string MemoryPlanner::streaming_advice() const {
    const bool streams =
        std::any_of(components_.begin(), components_.end(),
                    [&](const Component* one) { return can_stream(bundle_, *one); });
    return backend_.streams && !streams ? ", or less if it is built with: --weight-streaming" : "";
}

}  // namespace libsd35
