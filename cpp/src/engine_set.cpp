#include "engine_set.hpp"

#include <algorithm>

#include "components.hpp"
#include "error.hpp"

namespace libsd35 {
namespace {

bool knows_working_memory(const std::vector<const Component*>& components) {
    return std::all_of(components.begin(), components.end(), [](const Component* component) {
        return component->activation_bytes.has_value();
    });
}

}  // namespace

EngineSet::EngineSet(const Bundle& bundle, Device& device, std::optional<std::uint64_t> budget,
                     std::uint32_t threads, const Log& log)
    : bundle_(bundle),
      device_(device),
      threads_(threads),
      planner_(bundle, device.is_gpu(), budget),
      plan_(planner_.plan({}, {})) {
    if (budget && device.is_gpu() && !knows_working_memory(planner_.components())) {
        log.warn(bundle.root().string() +
                 " does not know what its engines work with: vram_budget counts their weights "
                 "alone, leave room for the rest");
    }
}

EngineSet::~EngineSet() {
    try {
        release();
    } catch (const std::exception&) {
        // The device failed before, and that was told where it did.
    }
}

void EngineSet::fit(const Dims& dims, const Nets& nets) {
    auto wanted = std::make_pair(dims, nets);
    if (fitted_ != wanted) {
        MemoryPlan plan = planner_.plan_within_budget(dims, nets);
        const std::lock_guard lock(mutex_);
        plan_ = std::move(plan);
        fitted_ = std::move(wanted);
        most_ = std::max(most_, plan_.peak_bytes);
    }
    for (const std::string& name : open_names()) {
        const bool unused = !stays(name) && placement(name) == nullptr;
        if (unused || held_[name] != held_bytes(name)) close(name);
    }
}

Session& EngineSet::use(std::string_view name) {
    for (const std::string& other : open_names()) {
        // What runs in every step runs in turn with this.
        const bool in_turn = runs_every_step(name) && runs_every_step(other);
        if (other != name && !in_turn && !stays(other)) close(other);
    }
    if (const auto coming = ahead_.find(name); coming != ahead_.end()) {
        Ahead opening = std::move(coming->second);
        ahead_.erase(coming);
        keep(name, opening.get());
    } else if (sessions_.find(name) == sessions_.end()) {
        make_room();
        held_[std::string(name)] = held_bytes(name);
        keep(name, open(std::string(name), held_bytes(name)));
    }
    device_.memory();  // notes the peak
    return *sessions_.find(name)->second;
}

void EngineSet::load_ahead(std::string_view name, std::string_view beside) {
    if (sessions_.find(name) != sessions_.end() || ahead_.find(name) != ahead_.end()) return;
    if (bundle_.manifest().component(name) == nullptr) return;
    if (!stays(name) && limited() && !have_room(name, beside)) return;
    make_room();
    const auto held = held_bytes(name);
    held_[std::string(name)] = held;
    ahead_.emplace(name, std::async(std::launch::async, [this, name = std::string(name), held] {
                       return open(name, held);
                   }));
}

void EngineSet::open_all() {
    std::vector<std::string> staying;
    for (const Component* component : planner_.components()) {
        if (stays(component->name)) staying.push_back(component->name);
    }
    // The denoiser is waited for last, or what is behind it would be opened after it.
    const auto denoiser = std::find(staying.begin(), staying.end(), "denoiser");
    if (denoiser != staying.end()) {
        load_ahead("denoiser", "denoiser");
        std::rotate(denoiser, denoiser + 1, staying.end());
    }
    for (const std::string& name : staying) use(name);
}

bool EngineSet::keeps(const std::vector<std::string>& names) const {
    return std::all_of(names.begin(), names.end(),
                       [this](const std::string& name) { return stays(name); });
}

void EngineSet::release() {
    for (const std::string& name : open_names()) close(name);
    device_.trim();
}

MemoryReport EngineSet::memory() {
    MemoryReport report{{}, device_.memory(), planner_.budget().value_or(0), 0};
    const std::lock_guard lock(mutex_);
    report.planned_peak = most_;
    for (const Component* component : planner_.components()) {
        const std::string& name = component->name;
        const Placement* place = placement(name);
        const bool open = sessions_.find(name) != sessions_.end();
        const Residence kind = place == nullptr ? Residence::loaded : place->kind;
        report.engines.push_back(
            {name, stays(name) ? Residence::resident : kind, open,
             open && place != nullptr ? place->device_bytes : planner_.weight_bytes(*component)});
    }
    return report;
}

// Nothing of what requests of the last size do not run.
const Placement* EngineSet::placement(std::string_view name) const {
    const auto found = plan_.placements.find(name);
    return found == plan_.placements.end() ? nullptr : &found->second;
}

bool EngineSet::stays(std::string_view name) const {
    const Placement* place = placement(name);
    return place == nullptr ? !limited() : place->kind == Residence::resident;
}

// Bytes of weights that an engine holds where it streams, by the plan.
std::optional<std::uint64_t> EngineSet::held_bytes(std::string_view name) const {
    const Placement* place = placement(name);
    const bool streams = place != nullptr && place->kind == Residence::streamed;
    return streams ? std::optional(place->device_bytes) : std::nullopt;
}

bool EngineSet::have_room(std::string_view coming, std::string_view running) const {
    const Placement* next = placement(coming);
    const Placement* now = placement(running);
    if (next == nullptr || now == nullptr) return false;
    std::uint64_t extra = 0;
    for (const auto& [name, place] : plan_.placements) {
        const bool in_turn = runs_every_step(running) && runs_every_step(name);
        if ((name == running || in_turn) && !stays(name)) extra += place.device_bytes;
    }
    return std::max(next->peak_bytes + extra, now->peak_bytes + next->device_bytes) <=
           *planner_.budget();
}

// Gives back what the engines before worked with: the plan counts it in their stages alone, where
// engines come and go.
void EngineSet::make_room() {
    if (limited()) device_.trim();
}

// Those that are being opened included.
std::vector<std::string> EngineSet::open_names() const {
    std::vector<std::string> names;
    for (const auto& [name, _] : sessions_) names.push_back(name);
    for (const auto& [name, _] : ahead_) names.push_back(name);
    return names;
}

// Runs in a thread of its own, too: it reads what does not change.
std::unique_ptr<Session> EngineSet::open(const std::string& name,
                                         std::optional<std::uint64_t> held) const {
    const Component* component = bundle_.manifest().component(name);
    if (component == nullptr) {
        throw bundle_error(bundle_.root().string() + " has no " + name, "build it again");
    }
    device_.activate();
    return open_session(bundle_, *component, device_, {threads_, held});
}

void EngineSet::keep(std::string_view name, std::unique_ptr<Session> session) {
    const std::lock_guard lock(mutex_);
    sessions_[std::string(name)] = std::move(session);
}

void EngineSet::close(const std::string& name) {
    if (name == "denoiser" && forget_denoiser_) forget_denoiser_();
    std::unique_ptr<Session> closing;
    if (const auto coming = ahead_.find(name); coming != ahead_.end()) {
        try {
            closing = coming->second.get();
        } catch (const std::exception&) {
            // It is not needed any more, so that it could not be opened harms nobody.
        }
        ahead_.erase(coming);
    }
    if (const auto found = sessions_.find(name); found != sessions_.end()) {
        const std::lock_guard lock(mutex_);
        closing = std::move(found->second);
        sessions_.erase(found);
    }
}

}  // namespace libsd35
