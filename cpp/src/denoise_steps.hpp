// One step of the denoise loop: computed directly, or the replay of a graph.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "conditioning.hpp"
#include "device.hpp"
#include "schedule.hpp"
#include "session.hpp"

namespace libsd35 {

// What changes from step to step, known before the loop.
struct Schedule {
    std::vector<float> sigmas;               // of a step and, last, after it
    std::vector<Coefficients> coefficients;  // one row for each step
    // How much of the third branch each image has in each step; none where the engine has none.
    std::vector<std::vector<float>> skip_guidance;
    bool next_sigmas;  // whether the engine is told the noise after each step, too

    // Whether a step has a third branch.
    bool skips(std::size_t step) const;
};

// An input that differs from step to step and has so many values for each image.
struct ConstantPort {
    std::string_view name;
    std::int64_t values;
};

// Those of a schedule, in the order in which step_constants() has their values.
std::vector<ConstantPort> constant_ports(const Schedule& schedule);

// What differs from step to step and is known before, of every step: float32 [S, n B] of the host,
// of each port one image after the other.
Buffer step_constants(const Schedule& schedule, std::size_t images);

// What an engine is given in every step of a run, by port.
struct RunInputs {
    Feed own;           // of this run, such as the guidance of each image [B]; graphs read copies
    Feed shared;        // what graphs may read where it is: it stays while they do
    Buffer layer_mask;  // [B, layers] of the steps with a third branch; empty where there are none
    Buffer no_residuals;  // of the steps without ControlNets; empty where it takes none
    bool guided = false;
};

// What a step computes.
struct StepKind {
    bool skipping = false;    // it has a third branch
    bool controlled = false;  // ControlNets made something for it
};

// What it computes, float32 [B, C, h, w] each; the step after the next overwrites both.
struct StepOutputs {
    Buffer latents;
    Buffer denoised;
};

// What differs from step to step, in as few buffers as can be: each is a copy before a replay.
struct StepInputs {
    Buffer constants;  // of a step, see step_constants()
    Buffer context;    // of both branches, the unconditional one first where there is one
    Buffer modulation;
};

// Names a step's inputs by port.
class StepFeeder {
  public:
    StepFeeder() = default;
    // For so many images; `device` is that of the masks.
    StepFeeder(Device& device, std::int64_t count, const RunInputs& run,
               std::vector<ConstantPort> constants);

    // Where ControlNets put what they make: the same place in every step.
    Buffer residuals(DType dtype, const Shape& shape);

    // All inputs but latents and the previous estimate.
    Feed ports(const StepInputs& inputs, StepKind kind) const;

  private:
    Device* device_ = nullptr;
    std::int64_t count_ = 0;
    std::vector<ConstantPort> constants_;
    bool guided_ = false;
    Feed fixed_;
    Buffer no_layers_;
    Buffer layer_mask_;
    Buffer no_residuals_;
    Buffer residuals_;
};

class Steps {
  public:
    virtual ~Steps() = default;

    // Queues a step.
    virtual StepOutputs run(std::size_t index, const StepInputs& inputs, StepKind kind) = 0;
    // What a step reads.
    virtual Buffer latents(std::size_t index) const = 0;
    // See StepFeeder.
    virtual Buffer residuals(DType dtype, const Shape& shape) = 0;
};

// Two buffers of each, used in turn: what a step reads, the next one overwrites.
struct PingPong {
    std::array<Buffer, 2> latents;
    std::array<Buffer, 2> denoised;

    // Computes a step on an engine.
    void compute(Session& session, std::size_t turn, Feed feed) const;
    // What that writes.
    StepOutputs outputs(std::size_t turn) const { return {latents[1 - turn], denoised[turn]}; }
};

// Steps that the engine computes from where the inputs are.
class DirectSteps final : public Steps {
  public:
    // `latents` are on the host, inputs on the device.
    DirectSteps(Device& device, Session& session, const Buffer& latents, const RunInputs& run,
                std::vector<ConstantPort> constants);

    StepOutputs run(std::size_t index, const StepInputs& inputs, StepKind kind) override;
    Buffer latents(std::size_t index) const override { return buffers_.latents[index % 2]; }
    Buffer residuals(DType dtype, const Shape& shape) override {
        return feeder_.residuals(dtype, shape);
    }

  private:
    Session& session_;
    StepFeeder feeder_;
    PingPong buffers_;
};

// Steps that replay graphs, one for each turn of the two buffers and kind of step, on inputs that
// are copied to where the graphs read them.
//
// The first steps of a shape run directly: engines allocate and choose kernels then.
class RecordedSteps final : public Steps {
  public:
    RecordedSteps(Device& device, Session& session, const Shape& latents, const RunInputs& run,
                  std::vector<ConstantPort> constants);
    ~RecordedSteps() override;
    RecordedSteps(const RecordedSteps&) = delete;
    RecordedSteps& operator=(const RecordedSteps&) = delete;

    // Takes a new batch of the same shape, whose inputs are the same ones.
    void begin(const Buffer& latents, const RunInputs& run);

    StepOutputs run(std::size_t index, const StepInputs& inputs, StepKind kind) override;
    Buffer latents(std::size_t index) const override { return buffers_.latents[index % 2]; }
    Buffer residuals(DType dtype, const Shape& shape) override {
        return feeder_.residuals(dtype, shape);
    }

  private:
    void place(const StepInputs& inputs);
    void forget();

    // Of one turn of the buffers, and a kind of step.
    struct Recording {
        std::unique_ptr<RecordedGraph> graph;
        bool ran = false;
    };

    Device& device_;
    Session& session_;
    PingPong buffers_;
    RunInputs copies_;
    StepFeeder feeder_;
    std::optional<StepInputs> inputs_;
    std::array<const std::byte*, 3> sources_{};  // addresses of what they were copied from
    std::array<std::array<Recording, 4>, 2> recordings_;
    std::uint64_t scratch_version_;
};

}  // namespace libsd35
