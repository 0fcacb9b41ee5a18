#include "result_notes.hpp"

#include <algorithm>
#include <optional>

#include "text.hpp"

namespace libsd35 {
namespace {

void add_once(std::vector<std::string>& notes, std::string note) {
    if (std::find(notes.begin(), notes.end(), note) == notes.end()) {
        notes.push_back(std::move(note));
    }
}

// Of the texts of one kind, each named by what it is.
void add_text_notes(std::vector<std::string>& notes, const std::string& kind,
                    const std::vector<Prompt>& texts, const SharedFeatures* features) {
    std::vector<std::size_t> unique;
    for (std::size_t i = 0; i < texts.size(); ++i) {
        if (std::find(texts.begin(), texts.begin() + static_cast<std::ptrdiff_t>(i), texts[i]) ==
            texts.begin() + static_cast<std::ptrdiff_t>(i)) {
            unique.push_back(i);
        }
    }
    for (std::size_t number = 0; number < unique.size(); ++number) {
        const std::string name =
            unique.size() == 1 ? "the " + kind : kind + " " + std::to_string(number + 1);
        for (const std::string& note : features[unique[number]]->notes) {
            add_once(notes, name + " " + note);
        }
    }
}

std::optional<std::string> skip_note(const Request& request) {
    const auto& skip = request.skips.front();
    if (!skip) return std::nullopt;
    if (request.guidance.front() == 1.0) {
        return "without guidance, skip-layer guidance has no effect";
    }
    const std::int64_t steps = request.drawn_steps();
    for (std::int64_t step = 0; step < steps; ++step) {
        if (skip->counts(step, steps)) return std::nullopt;
    }
    return "none of " + std::to_string(steps) + " steps is between " + general(skip->start) +
           " and " + general(skip->stop) + ": no layer was skipped";
}

std::string control_note(const ControlUse& use, std::int64_t steps) {
    return "none of " + std::to_string(steps) + " steps is between " + general(use.start) +
           " and " + general(use.end) + ": the ControlNet " + use.name + " did not run";
}

}  // namespace

std::vector<std::string> notes_of(const Request& request, const TextBranches& branches) {
    std::vector<std::string> notes;
    const auto& negatives = request.negatives;
    if (branches.negatives != nullptr) {
        add_text_notes(notes, "negative prompt", negatives, branches.negatives);
    }
    add_text_notes(notes, "prompt", request.prompts, branches.prompts);
    const bool steers = std::any_of(negatives.begin(), negatives.end(),
                                    [](const Prompt& prompt) { return !prompt.empty(); });
    if (steers && request.guidance.front() == 1.0) {
        add_once(notes, "without guidance, the negative prompt has no effect");
    }
    if (const auto note = skip_note(request)) add_once(notes, *note);
    for (const ControlUse& use : request.controls) {
        const std::int64_t steps = request.drawn_steps();
        if (!use.counts_at_all(steps)) add_once(notes, control_note(use, steps));
    }
    return notes;
}

}  // namespace libsd35
