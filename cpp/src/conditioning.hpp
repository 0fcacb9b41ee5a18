// Context and modulation of each step, computed by a conditioner several steps at a time.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runner.hpp"
#include "text_features.hpp"

namespace libsd35 {

// What the denoiser, or a ControlNet, is told of text and time in one step, of all samples.
struct Conditioning {
    Buffer context;     // [N, T, D]; empty of a ControlNet without a text stream
    Buffer modulation;  // [N, R, D]
};

// What conditioners run on.
struct ConditioningMeans {
    Device& device;
    EngineSet& engines;
    ComponentRunner& runner;
};

// What a conditioner computes.
struct ConditioningTask {
    std::string component;                        // the transformer's, or that of a ControlNet
    const std::vector<SharedFeatures>& features;  // of the text of each sample
    std::vector<float> timesteps;
    Feed adapters;                    // inputs of the conditioner for them
    std::vector<std::string> beside;  // components that run in every step
};

// The conditioning of steps of one picture, in order.
class ConditioningSteps {
  public:
    // Computing begins. Throws Error.
    ConditioningSteps(const ConditioningMeans& means, const ConditioningTask& task);

    // Of the next step. Throws Error where the conditioner fails.
    Conditioning next();

  private:
    Feed inputs_of(const ConditioningTask& task) const;
    void compute_chunk();
    std::size_t chunk_steps() const;

    Device& device_;
    ComponentRunner& runner_;
    std::string component_;
    std::int64_t samples_;
    std::int64_t tokens_;
    std::vector<float> timesteps_;
    Feed inputs_;  // all but the timesteps
    std::size_t chunk_;
    bool waits_on_host_;  // the conditioner and what runs in every step have no room together
    std::size_t computed_ = 0;
    std::size_t given_ = 0;
    Buffer context_;
    std::vector<Buffer> chunks_;  // modulation [steps, N, R, D], those that steps still need
};

}  // namespace libsd35
