// One step of the denoise loop: computed directly, or the replay of a graph.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "conditioning.hpp"
#include "device.hpp"
#include "session.hpp"

namespace libsd35 {

// What differs from step to step, in as few buffers as can be: each is a copy before a replay.
struct StepInputs {
    Buffer constants;  // float32 [4 B]: of each image sigma, then its three coefficients
    Buffer context;    // of both branches, the unconditional one first where there is one
    Buffer modulation;

    // Inputs of the engine for `count` images; `guidance` is empty where it has none.
    Feed ports(std::int64_t count, const Buffer& guidance) const;
};

class Steps {
  public:
    virtual ~Steps() = default;

    // Queues a step; returns the buffer of its latents.
    virtual Buffer run(std::size_t index, const StepInputs& inputs) = 0;
};

// Two buffers of each, used in turn: what a step reads, the next one overwrites.
struct PingPong {
    std::array<Buffer, 2> latents;
    std::array<Buffer, 2> denoised;

    // Computes a step on an engine; returns the buffer of its latents.
    Buffer compute(Session& session, std::size_t turn, const StepInputs& inputs,
                   const Buffer& guidance) const;
};

// Steps that the engine computes from where the inputs are.
class DirectSteps final : public Steps {
  public:
    // `latents` are on the host; `guidance` is on the device.
    DirectSteps(Device& device, Session& session, const Buffer& latents, Buffer guidance);

    Buffer run(std::size_t index, const StepInputs& inputs) override;

  private:
    Session& session_;
    Buffer guidance_;
    PingPong buffers_;
};

// Steps that replay graphs, one for each turn of the two buffers, on inputs that are copied to
// where the graphs read them.
//
// The first two steps of a shape run directly: engines allocate and choose kernels then.
class RecordedSteps final : public Steps {
  public:
    RecordedSteps(Device& device, Session& session, const Shape& latents, const Buffer& guidance);
    ~RecordedSteps() override;
    RecordedSteps(const RecordedSteps&) = delete;
    RecordedSteps& operator=(const RecordedSteps&) = delete;

    // Takes a new batch of the same shape.
    void begin(const Buffer& latents, const Buffer& guidance);

    Buffer run(std::size_t index, const StepInputs& inputs) override;

  private:
    void place(const StepInputs& inputs);
    void forget();

    Device& device_;
    Session& session_;
    PingPong buffers_;
    Buffer guidance_;
    std::optional<StepInputs> inputs_;
    std::array<const std::byte*, 3> sources_{};  // addresses of what they were copied from
    std::array<std::unique_ptr<RecordedGraph>, 2> graphs_;
    std::array<bool, 2> ran_{};
    std::uint64_t scratch_version_;
};

}  // namespace libsd35
