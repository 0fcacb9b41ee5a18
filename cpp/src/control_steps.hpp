// What ControlNets make in the steps of a run, on the device.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "conditioning.hpp"
#include "controls.hpp"

namespace libsd35 {

// What the denoiser takes where no net runs; empty where it takes none.
Buffer no_residuals(const Manifest& manifest, Device& device);

// The nets of a run: they add up, in the bundle's order.
class ControlRun {
  public:
    // Of so many steps; `hints` are the latents of each use's pictures [B, C, h, w], on the host.
    // Throws Error.
    ControlRun(Device& device, const Manifest& manifest, const ControlUses& uses,
               const std::vector<Buffer>& hints, std::size_t steps);

    // Computes what depends on the text and the timesteps alone; `features` of each sample,
    // `timesteps` of each step.
    void condition(const ConditioningMeans& means, const std::vector<SharedFeatures>& features,
                   const std::vector<float>& timesteps);

    // Opens the nets' engines, which stay for the run's steps.
    void open(EngineSet& engines);

    // Whether a net runs in a step.
    bool counts(std::size_t step) const;

    // Queues what the nets of a step make of its latents, into a buffer of shape().
    void run(std::size_t step, const Buffer& latents, const Buffer& out);

    // What the nets make together.
    const Shape& shape() const noexcept { return shape_; }
    DType dtype() const noexcept { return dtype_; }

  private:
    struct Net {
        ControlUse use;
        Buffer hint;
        Buffer scale;  // of each image [B]
        std::optional<ConditioningSteps> conditioning;
        Session* session = nullptr;

        bool counts(std::size_t step, std::size_t steps) const;
    };

    Feed feed_of(Net& net, const Buffer& latents, const Buffer& before) const;
    const Buffer& spare(std::size_t number);

    Device& device_;
    std::size_t steps_;
    Buffer nothing_;
    std::vector<Net> nets_;
    Shape shape_;
    DType dtype_;
    std::vector<Buffer> between_;
};

}  // namespace libsd35
