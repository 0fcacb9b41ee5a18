#include "denoise.hpp"

#include <algorithm>
#include <cstring>
#include <deque>

namespace libsd35 {
namespace {

// Shapes whose buffers and graphs are kept.
constexpr std::size_t most_shapes = 2;

std::vector<const std::byte*> addresses_of(const Feed& feed) {
    std::vector<const std::byte*> addresses;
    for (const auto& [_, buffer] : feed) addresses.push_back(buffer.address());
    return addresses;
}

// How many steps are queued before the host looks at the oldest.
std::size_t queue_depth(const Device& device, std::size_t latent_bytes, std::size_t total,
                        bool watched) {
    if (!device.queues()) return 1;
    if (watched) return 2;
    return std::max<std::size_t>(
        2, std::min(total, slot_bytes / std::max<std::size_t>(latent_bytes, 1)));
}

}  // namespace

// One batch on its way.
class DenoiseLoop::Run {
  public:
    Run(Device& device, const Schedule& schedule, const Buffer& latents,
        const std::function<bool(const Step&)>& after_step, std::vector<Buffer> slots,
        std::size_t depth)
        : device_(device),
          schedule_(schedule),
          after_step_(after_step),
          slots_(std::move(slots)),
          depth_(depth),
          copy_(latents) {}

    // Copies read buffers of this run: waited for also where a step failed.
    ~Run() {
        try {
            while (!pending_.empty()) take_oldest();
            device_.synchronize();
        } catch (const std::exception&) {
            // What failed was told as an error where it ran.
        }
    }

    Run(const Run&) = delete;
    Run& operator=(const Run&) = delete;

    // This step overwrites what was copied two steps before.
    void before(std::size_t index) {
        if (index >= 2) fetches_[index - 2]->fence();
    }

    // Takes a step that was queued; false where the loop ends.
    bool queued(std::size_t index, const StepOutputs& outputs) {
        const Buffer slot = slots_.empty() ? Buffer() : slots_[index % depth_];
        fetches_.push_back(device_.fetch(outputs.latents, slot));
        pending_.emplace_back(index, outputs.denoised);
        while (pending_.size() >= depth_) {
            if (!look()) return false;
        }
        return true;
    }

    // Looks at what is left; returns the last copy.
    Buffer finish() {
        while (!pending_.empty() && look()) {
        }
        return copy_;
    }

    Buffer copy() const { return copy_; }

  private:
    // A step, and the device's buffer of what it took for the finished latents.
    using Pending = std::pair<std::size_t, Buffer>;

    Pending take_oldest() {
        Pending step = std::move(pending_.front());
        pending_.pop_front();
        copy_ = fetches_[step.first]->wait();
        return step;
    }

    bool look() {
        const auto [index, denoised] = take_oldest();
        // Only one step more was queued: it has not overwritten this one's.
        const auto fetch = [this, from = denoised] { return device_.download(from); };
        return after_step_(
            {index, schedule_.coefficients.size(), schedule_.sigmas[index + 1], copy_, fetch});
    }

    Device& device_;
    const Schedule& schedule_;
    const std::function<bool(const Step&)>& after_step_;
    std::vector<Buffer> slots_;
    std::size_t depth_;
    Buffer copy_;
    std::vector<std::unique_ptr<Fetch>> fetches_;
    std::deque<Pending> pending_;
};

Denoised DenoiseLoop::run(Session& session, const Buffer& latents, const Schedule& schedule,
                          ConditioningSteps& conditioning,
                          const std::function<bool(const Step&)>& after_step, bool watched,
                          Clock& clock, const RunInputs& inputs, ControlRun* controls) {
    const std::size_t total = schedule.coefficients.size();
    const auto images = static_cast<std::size_t>(latents.shape()[0]);
    const Buffer constants = device_.upload(step_constants(schedule, images));
    const std::vector<ConstantPort> ports = constant_ports(schedule);
    std::optional<DirectSteps> direct;
    const bool records = device_.queues() && session.recordable();
    if (!records) direct.emplace(device_, session, latents, inputs, ports);
    Steps& steps = records ? recorded_steps(session, latents, inputs, ports) : *direct;
    const std::size_t depth = queue_depth(device_, latents.bytes(), total, watched);
    StepOutputs current;
    Buffer last;
    {
        Run run(device_, schedule, latents, after_step, slots_.take(latents.shape(), depth), depth);
        bool going = true;
        for (std::size_t i = 0; going && i < total; ++i) {
            const Conditioning told = conditioning.next();
            if (i == 0) device_.synchronize();  // tells conditioning from denoising
            clock.lap("conditioning");
            run.before(i);
            const StepKind kind{schedule.skips(i), controls != nullptr && controls->counts(i)};
            if (kind.controlled) {
                const Buffer made = steps.residuals(controls->dtype(), controls->shape());
                controls->run(i, steps.latents(i), made);
            }
            current = steps.run(
                i, {constants.row(static_cast<std::int64_t>(i)), told.context, told.modulation},
                kind);
            going = run.queued(i, current);
            clock.lap("denoise");
        }
        last = going ? run.finish() : run.copy();
    }
    clock.lap("denoise");
    return {current.latents, last};
}

Steps& DenoiseLoop::recorded_steps(Session& session, const Buffer& latents, const RunInputs& inputs,
                                   const std::vector<ConstantPort>& constants) {
    const std::vector<const std::byte*> shared = addresses_of(inputs.shared);
    const auto known = std::find_if(recorded_.begin(), recorded_.end(), [&](const Recorded& one) {
        return one.shape == latents.shape() && one.shared == shared;
    });
    if (known != recorded_.end() && known->session == &session) {
        recorded_.splice(recorded_.end(), recorded_, known);
    } else {
        if (known != recorded_.end()) recorded_.erase(known);
        recorded_.push_back({latents.shape(), shared, &session,
                             std::make_unique<RecordedSteps>(device_, session, latents.shape(),
                                                             inputs, constants)});
        if (recorded_.size() > most_shapes) recorded_.pop_front();
    }
    RecordedSteps& steps = *recorded_.back().steps;
    steps.begin(latents, inputs);
    return steps;
}

}  // namespace libsd35
