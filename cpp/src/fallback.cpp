#include "fallback.hpp"

#include <algorithm>
#include <iterator>

#include "error.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

// So many anomalous images in a row, and the second bundle takes over.
constexpr int patience = 2;

void add_note(const std::vector<Job*>& jobs, const std::string& note) {
    for (Job* job : jobs) {
        if (Result* result = job->result()) result->notes.push_back(note);
    }
}

std::int64_t most_rank(const Manifest& manifest) {
    return manifest.adapter_ranks.empty() ? 0 : manifest.adapter_ranks.back();
}

// What one bundle requires that another does not have.
std::vector<std::string> lacking(const Manifest& its, const Manifest& mine) {
    std::vector<std::string> names;
    std::set_difference(mine.required.begin(), mine.required.end(), its.required.begin(),
                        its.required.end(), std::back_inserter(names));
    return names;
}

// Names of ControlNets that one bundle has, and another lacks.
std::vector<std::string> lacking_nets(const Manifest& its, const Manifest& mine) {
    std::vector<std::string> names;
    for (const ControlRecord& control : mine.controls) {
        if (its.control(control.name) == nullptr) names.push_back(control.name);
    }
    std::sort(names.begin(), names.end());
    return names;
}

bool is_not_finite(const Job& job) {
    return job.error() != nullptr && job.error()->status() == SD35_NOT_FINITE;
}

}  // namespace

void check_fallback(const Bundle& bundle, const Bundle& fallback) {
    const Manifest& mine = bundle.manifest();
    const Manifest& its = fallback.manifest();
    const std::string own = bundle.root().string();
    std::string difference;
    if (its.variant != mine.variant) {
        difference = "is " + its.variant + ", " + own + " is " + mine.variant;
    } else if (mine.guided && !its.guided) {
        difference = "was built without guidance, " + own + " with it";
    } else if (!its.ranges.include(mine.ranges)) {
        difference = "accepts fewer batches, sizes or text lengths than " + own;
    } else if (most_rank(its) < most_rank(mine)) {
        difference = "takes adapters of a lower rank than " + own;
    } else if (const auto nets = lacking_nets(its, mine); !nets.empty()) {
        difference = "has no ControlNet " + join(nets) + ", " + own + " has";
    } else if (const auto names = lacking(its, mine); !names.empty()) {
        difference = "was built without " + join(names) + ", " + own + " with it";
    }
    if (!difference.empty()) {
        throw bundle_error("the fallback " + fallback.root().string() + " " + difference,
                           "build one with the same model and options");
    }
}

void Fallback::restore() noexcept {
    in_a_row_ = 0;
    active_ = false;
}

void Fallback::draw(const std::vector<Job*>& jobs, Clock& clock) {
    const std::string its_name = second_.bundle().root().string();
    if (active_) {
        draw_second(jobs, clock);
        add_note(jobs, "drawn with the fallback " + its_name);
        return;
    }
    first_.draw(jobs, clock);
    count(jobs);
    std::vector<Job*> again;
    for (Job* job : jobs) {
        if (is_not_finite(*job)) again.push_back(job);
    }
    if (again.empty()) return;
    for (Job* job : again) job->outcome = std::monostate();
    draw_second(again, clock);
    add_note(again, "drawn again with the fallback " + its_name);
}

// Switches to the second where it is time.
void Fallback::count(const std::vector<Job*>& jobs) {
    for (Job* job : jobs) {
        // Cancelled: nothing is known of its images.
        if (job->result() == nullptr && !is_not_finite(*job)) continue;
        for (std::size_t image = 0; image < job->request.count(); ++image) {
            // What one asks for moves nobody else.
            if (!is_usual(first_.bundle().manifest(), job->request, image)) continue;
            count_image(std::any_of(job->anomalies.begin(), job->anomalies.end(),
                                    [&](const Anomaly& one) { return one.image == image; }));
        }
    }
}

void Fallback::count_image(bool anomalous) {
    in_a_row_ = anomalous ? in_a_row_ + 1 : 0;
    if (in_a_row_ != patience) return;
    active_ = true;
    log_.error(first_.bundle().root().string() + ": " + std::to_string(patience) +
               " anomalous images in a row; drawing with " + second_.bundle().root().string() +
               " until it is restored");
}

void Fallback::draw_second(const std::vector<Job*>& jobs, Clock& clock) {
    // A budget is for one of the two at a time.
    const bool limited = first_.engines().limited();
    if (limited) first_.engines().release();
    second_.activate();
    second_.draw(jobs, clock);
    if (limited) second_.engines().release();
    first_.activate();
}

}  // namespace libsd35
