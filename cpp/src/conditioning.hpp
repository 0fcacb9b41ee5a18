// Context and modulation of each step, computed by the conditioner several steps at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "runner.hpp"

namespace libsd35 {

// What the denoiser is told of text and time in one step, of all samples.
struct Conditioning {
    Buffer context;     // [N, T, D]
    Buffer modulation;  // [N, R, D]
};

// The conditioning of the steps of one picture, in order.
class ConditioningSteps {
  public:
    // `hidden` is [N, T, width] and `pooled` [N, pooled width], on the host; `adapters` are inputs
    // of the conditioner. Throws Error.
    ConditioningSteps(Device& device, EngineSet& engines, ComponentRunner& runner,
                      const Buffer& hidden, const Buffer& pooled, std::vector<float> timesteps,
                      Feed adapters);

    // Of the next step. Throws Error where the conditioner fails.
    Conditioning next();

  private:
    void compute_chunk();
    std::size_t chunk_steps(std::int64_t samples) const;

    Device& device_;
    ComponentRunner& runner_;
    Buffer hidden_;
    Buffer pooled_;
    std::vector<float> timesteps_;
    Feed adapters_;
    std::size_t chunk_;
    bool waits_on_host_;  // conditioner and denoiser have no room beside each other
    std::size_t computed_ = 0;
    std::size_t given_ = 0;
    Buffer context_;
    std::vector<Buffer> chunks_;  // modulation [steps, N, R, D], those that steps still need
};

}  // namespace libsd35
