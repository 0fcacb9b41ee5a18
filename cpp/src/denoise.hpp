// The denoise loop: latents stay on the device, the host looks at copies behind it.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <utility>
#include <vector>

#include "clock.hpp"
#include "conditioning.hpp"
#include "control_steps.hpp"
#include "denoise_steps.hpp"
#include "host_slots.hpp"
#include "job.hpp"

namespace libsd35 {

// The last latents, on the device and on the host.
struct Denoised {
    Buffer device;
    Buffer host;
};

// Denoising on one engine. Where the engine's work can be recorded, a step is the replay of a
// graph.
//
// Steps are queued ahead of what the host has seen: by one where somebody looks at each, else by as
// many as there is memory for. The device never waits for the host.
class DenoiseLoop {
  public:
    explicit DenoiseLoop(Device& device) : device_(device), slots_(device) {}

    // Denoises a batch.
    //
    // `session` is the denoiser, `latents` float32 [B, C, h, w] on the host. `after_step` is called
    // once per step, in order; false ends the loop, and the latents are then some. `watched` says
    // whether somebody acts on what it sees. `inputs` are those of every step, `controls` the
    // ControlNets, whose engines are open; NULL where none runs. Throws Error where an engine
    // fails.
    Denoised run(Session& session, const Buffer& latents, const Schedule& schedule,
                 ConditioningSteps& conditioning,
                 const std::function<bool(const Step&)>& after_step, bool watched, Clock& clock,
                 const RunInputs& inputs, ControlRun* controls);

    // Releases graphs and their buffers; called before an engine that was recorded closes.
    void forget() { recorded_.clear(); }

  private:
    class Run;

    Steps& recorded_steps(Session& session, const Buffer& latents, const RunInputs& inputs,
                          const std::vector<ConstantPort>& constants);

    struct Recorded {
        Shape shape;
        std::vector<const std::byte*> shared;  // addresses that the graphs read
        Session* session;
        std::unique_ptr<RecordedSteps> steps;
    };

    Device& device_;
    HostSlots slots_;
    std::list<Recorded> recorded_;  // the one that was used last, last
};

}  // namespace libsd35
