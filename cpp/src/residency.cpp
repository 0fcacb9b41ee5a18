#include "residency.hpp"

#include <algorithm>
#include <tuple>

namespace libsd35 {
namespace {

// Which engines stay, by their place.
using Residents = std::vector<bool>;

using Engines = std::vector<Footprint>;
using Budget = std::optional<std::uint64_t>;

// What is in memory beside an engine while it runs.
class Beside {
  public:
    Beside(const Engines& engines, const Residents& residents, Budget budget, std::uint64_t reserve)
        : engines_(engines), fixed_(reserve), held_(engines.size()) {
        for (std::size_t i = 0; i < engines.size(); ++i) {
            if (residents[i]) resident_ += engines[i].weight_bytes;
            if (engines[i].keeps_activations) fixed_ += engines[i].activation_bytes;
            if (!engines[i].every_step) continue;
            if (!engines[i].keeps_activations) {
                loop_working_ = std::max(loop_working_, engines[i].activation_bytes);
            }
            if (!residents[i]) held_[i] = engines[i].weight_bytes;
        }
        fixed_ += resident_;
        if (budget) stream_where_needed(*budget);
    }

    std::uint64_t resident() const { return resident_; }

    std::uint64_t of(std::size_t i) const {
        std::uint64_t bytes = fixed_ + working(i);
        if (held_[i]) bytes += all_held() - *held_[i];
        return bytes;
    }

    // Says what an engine that runs in turn with others holds.
    void hold(std::size_t i, std::uint64_t bytes) {
        if (held_[i]) held_[i] = bytes;
    }

  private:
    // Of the engines that run in turn, each works in what the largest needs.
    std::uint64_t working(std::size_t i) const {
        const Footprint& engine = engines_[i];
        if (engine.every_step) return loop_working_;
        return engine.keeps_activations ? 0 : engine.activation_bytes;
    }

    std::uint64_t all_held() const {
        std::uint64_t bytes = 0;
        for (const auto& one : held_) bytes += one.value_or(0);
        return bytes;
    }

    // Where the engines that run in turn have no room together, those that can stream do.
    void stream_where_needed(std::uint64_t budget) {
        const std::uint64_t together = all_held();
        bool fits = true;
        for (std::size_t i = 0; i < held_.size(); ++i) {
            if (held_[i] && fixed_ + working(i) + together > budget) fits = false;
        }
        if (fits) return;
        for (std::size_t i = 0; i < held_.size(); ++i) {
            if (held_[i] && engines_[i].stream_bytes) held_[i] = *engines_[i].stream_bytes;
        }
    }

    const Engines& engines_;
    std::uint64_t resident_ = 0;
    std::uint64_t fixed_;  // whatever runs
    std::uint64_t loop_working_ = 0;
    // Of the engines that run in turn and do not stay, what each holds.
    std::vector<std::optional<std::uint64_t>> held_;
};

// Weights that stream cross the bus once per run whatever part of them is held; holding more than
// the other stages need anyway helps only an engine that runs more than once.
Placement place_streamed(const Footprint& engine, std::uint64_t others, std::uint64_t limit) {
    const std::uint64_t weights = engine.weight_bytes;
    const std::uint64_t least = *engine.stream_bytes;
    const std::uint64_t room = limit > others ? limit - others : 0;
    const std::uint64_t share = std::min(std::max(room, least), weights);
    // What streams goes through buffers of this size, beside what is held.
    const std::uint64_t passing = weights - (share > least ? share - least : 0);
    return {Residence::streamed, share, weights - passing + passing * engine.runs, others + share};
}

std::uint64_t peak_of(const std::vector<Placement>& placements) {
    std::uint64_t peak = 0;
    for (const Placement& one : placements) peak = std::max(peak, one.peak_bytes);
    return peak;
}

Residency place(const Engines& engines, const Residents& residents, Budget budget,
                std::uint64_t reserve) {
    Beside beside(engines, residents, budget, reserve);
    Residency plan{std::vector<Placement>(engines.size()), beside.resident(), 0, 0, true};
    std::vector<std::size_t> streamed;
    for (std::size_t i = 0; i < engines.size(); ++i) {
        const Footprint& engine = engines[i];
        const std::uint64_t weights = engine.weight_bytes;
        const std::uint64_t others = beside.of(i);
        if (residents[i]) {
            plan.placements[i] = {Residence::resident, weights, 0, others};
        } else if (!budget || others + weights <= *budget || !engine.stream_bytes) {
            plan.placements[i] = {Residence::loaded, weights, weights, others + weights};
            beside.hold(i, weights);
        } else {
            streamed.push_back(i);
        }
    }
    const std::uint64_t peak = peak_of(plan.placements);
    for (const std::size_t i : streamed) {
        const std::uint64_t limit = !budget || engines[i].runs == 1 ? peak : *budget;
        plan.placements[i] = place_streamed(engines[i], beside.of(i), limit);
        beside.hold(i, plan.placements[i].device_bytes);
    }
    plan.peak_bytes = peak_of(plan.placements);
    for (const Placement& one : plan.placements) plan.bus_bytes += one.bus_bytes;
    plan.fits = !budget || plan.peak_bytes <= *budget;
    return plan;
}

// Smaller is better.
auto rank(const Residency& plan) {
    return std::make_tuple(!plan.fits, plan.fits ? plan.bus_bytes : 0, plan.peak_bytes,
                           ~plan.resident_bytes);
}

// Engines that stay together or not at all: those of every step first, then each other one.
std::vector<std::vector<std::size_t>> units_of(const Engines& engines) {
    std::vector<std::vector<std::size_t>> units(1);
    for (std::size_t i = 0; i < engines.size(); ++i) {
        if (engines[i].every_step) units.front().push_back(i);
    }
    if (units.front().empty()) units.clear();
    for (std::size_t i = 0; i < engines.size(); ++i) {
        if (!engines[i].every_step) units.push_back({i});
    }
    return units;
}

// Sets of so many units, a bit for each, as Python's itertools.combinations gives them: smaller
// ones first, then in the order of their members. Of plans that are equally good, the first is
// taken.
std::vector<std::uint32_t> sets_of(std::size_t count) {
    std::vector<std::uint32_t> sets(std::size_t{1} << count);
    for (std::size_t i = 0; i < sets.size(); ++i) sets[i] = static_cast<std::uint32_t>(i);
    const auto reversed = [count](std::uint32_t set) {
        std::uint32_t result = 0;
        for (std::size_t i = 0; i < count; ++i) {
            if ((set >> i & 1U) != 0) result |= 1U << (count - 1 - i);
        }
        return result;
    };
    std::sort(sets.begin(), sets.end(), [&](std::uint32_t a, std::uint32_t b) {
        const int more = __builtin_popcount(a) - __builtin_popcount(b);
        return more != 0 ? more < 0 : reversed(a) > reversed(b);
    });
    return sets;
}

}  // namespace

const char* name_of(Residence residence) {
    switch (residence) {
        case Residence::resident:
            return "resident";
        case Residence::loaded:
            return "loaded";
        case Residence::streamed:
            break;
    }
    return "streamed";
}

Residency plan_residency(const Engines& engines, Budget budget, std::uint64_t reserve) {
    if (!budget) return place(engines, Residents(engines.size(), true), budget, reserve);
    const auto units = units_of(engines);
    std::optional<Residency> best;
    for (const std::uint32_t set : sets_of(units.size())) {
        Residents residents(engines.size());
        for (std::size_t unit = 0; unit < units.size(); ++unit) {
            for (const std::size_t i : units[unit]) residents[i] = (set >> unit & 1U) != 0;
        }
        Residency plan = place(engines, residents, budget, reserve);
        if (!best || rank(plan) < rank(*best)) best = std::move(plan);
    }
    return *best;
}

}  // namespace libsd35
