#include "residency.hpp"

#include <algorithm>
#include <tuple>

namespace libsd35 {
namespace {

// A bit for each engine that stays.
using Residents = std::uint32_t;

using Engines = std::vector<Footprint>;
using Budget = std::optional<std::uint64_t>;

bool stays(Residents residents, std::size_t i) {
    return (residents >> i & 1U) != 0;
}

// What is taken whatever runs, and besides by each engine while it runs.
struct Common {
    std::uint64_t resident = 0;
    std::uint64_t reserve = 0;

    std::uint64_t beside(const Footprint& engine) const {
        return resident + reserve + (engine.keeps_activations ? 0 : engine.activation_bytes);
    }
};

Common common_bytes(const Engines& engines, Residents residents, std::uint64_t reserve) {
    Common common{0, reserve};
    for (std::size_t i = 0; i < engines.size(); ++i) {
        if (stays(residents, i)) common.resident += engines[i].weight_bytes;
        if (engines[i].keeps_activations) common.reserve += engines[i].activation_bytes;
    }
    return common;
}

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

Residency place(const Engines& engines, Residents residents, Budget budget, std::uint64_t reserve) {
    const Common common = common_bytes(engines, residents, reserve);
    Residency plan{std::vector<Placement>(engines.size()), common.resident, 0, 0, true};
    std::vector<std::size_t> streamed;
    for (std::size_t i = 0; i < engines.size(); ++i) {
        const Footprint& engine = engines[i];
        const std::uint64_t weights = engine.weight_bytes;
        const std::uint64_t others = common.beside(engine);
        if (stays(residents, i)) {
            plan.placements[i] = {Residence::resident, weights, 0, others};
        } else if (!budget || others + weights <= *budget || !engine.stream_bytes) {
            plan.placements[i] = {Residence::loaded, weights, weights, others + weights};
        } else {
            streamed.push_back(i);
        }
    }
    const std::uint64_t peak = peak_of(plan.placements);
    for (const std::size_t i : streamed) {
        const std::uint64_t limit = !budget || engines[i].runs == 1 ? peak : *budget;
        plan.placements[i] = place_streamed(engines[i], common.beside(engines[i]), limit);
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

// Sets of engines as Python's itertools.combinations gives them: smaller ones first, then in the
// order of their members. Of plans that are equally good, the first is taken.
std::vector<Residents> sets_of(std::size_t count) {
    std::vector<Residents> sets(std::size_t{1} << count);
    for (std::size_t i = 0; i < sets.size(); ++i) sets[i] = static_cast<Residents>(i);
    const auto reversed = [count](Residents set) {
        Residents result = 0;
        for (std::size_t i = 0; i < count; ++i) {
            if (stays(set, i)) result |= 1U << (count - 1 - i);
        }
        return result;
    };
    std::sort(sets.begin(), sets.end(), [&](Residents a, Residents b) {
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
    const std::vector<Residents> sets = sets_of(engines.size());
    if (!budget) return place(engines, sets.back(), budget, reserve);
    Residency best = place(engines, sets.front(), budget, reserve);
    for (std::size_t i = 1; i < sets.size(); ++i) {
        Residency plan = place(engines, sets[i], budget, reserve);
        if (rank(plan) < rank(best)) best = std::move(plan);
    }
    return best;
}

}  // namespace libsd35
