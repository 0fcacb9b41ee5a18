#include "denoise_steps.hpp"

#include "error.hpp"

namespace libsd35 {

Feed StepInputs::ports(std::int64_t count, const Buffer& guidance) const {
    const std::int64_t samples = context.shape()[0];
    Feed feed{{"sigma", constants.rows(0, count)},
              {"coefficients", constants.rows(count, 3 * count).reshape({count, 3})},
              {"context", context.rows(samples - count, count)},
              {"modulation", modulation.rows(samples - count, count)}};
    if (guidance) {
        feed.emplace_back("uncond_context", context.rows(0, count));
        feed.emplace_back("uncond_modulation", modulation.rows(0, count));
        feed.emplace_back("guidance", guidance);
    }
    return feed;
}

Buffer PingPong::compute(Session& session, std::size_t turn, const StepInputs& inputs,
                         const Buffer& guidance) const {
    const std::size_t other = 1 - turn;
    Feed feed = inputs.ports(latents[turn].shape()[0], guidance);
    feed.emplace_back("latents", latents[turn]);
    feed.emplace_back("previous_denoised", denoised[other]);
    session.run(feed, {{"next_latents", latents[other]}, {"denoised", denoised[turn]}});
    return latents[other];
}

DirectSteps::DirectSteps(Device& device, Session& session, const Buffer& latents, Buffer guidance)
    : session_(session), guidance_(std::move(guidance)) {
    const Shape& shape = latents.shape();
    // Copies: the CPU's buffers may share the memory of what they are made of.
    buffers_.latents = {device.upload(host_copy(latents)), device.empty(DType::float32, shape)};
    buffers_.denoised = {device.empty(DType::float32, shape),
                         device.upload(host_zeros(DType::float32, shape))};
}

Buffer DirectSteps::run(std::size_t index, const StepInputs& inputs) {
    return buffers_.compute(session_, index % 2, inputs, guidance_);
}

RecordedSteps::RecordedSteps(Device& device, Session& session, const Shape& latents,
                             const Buffer& guidance)
    : device_(device), session_(session), scratch_version_(device.scratch_version()) {
    for (std::size_t i = 0; i < 2; ++i) {
        buffers_.latents[i] = device.empty(DType::float32, latents);
        buffers_.denoised[i] = device.empty(DType::float32, latents);
    }
    if (guidance) guidance_ = device.empty(guidance.dtype(), guidance.shape());
}

RecordedSteps::~RecordedSteps() {
    try {
        device_.synchronize();
    } catch (const std::exception&) {
        // What failed was told as an error where it ran.
    }
}

void RecordedSteps::begin(const Buffer& latents, const Buffer& guidance) {
    sources_ = {};
    device_.copy(device_.upload(latents), buffers_.latents[0]);
    device_.copy(device_.upload(host_zeros(DType::float32, latents.shape())), buffers_.denoised[1]);
    if (guidance) device_.copy(guidance, guidance_);
}

Buffer RecordedSteps::run(std::size_t index, const StepInputs& inputs) {
    place(inputs);
    const std::size_t turn = index % 2;
    if (device_.scratch_version() != scratch_version_) forget();
    const auto compute = [&] { buffers_.compute(session_, turn, *inputs_, guidance_); };
    if (graphs_[turn] == nullptr && ran_[turn]) graphs_[turn] = device_.capture(compute);
    if (graphs_[turn] != nullptr) {
        graphs_[turn]->replay();
    } else {
        compute();
        ran_[turn] = true;
    }
    return buffers_.latents[1 - turn];
}

// Copies a step's inputs to where the graphs read them.
void RecordedSteps::place(const StepInputs& inputs) {
    // The text may be of another length.
    if (!inputs_ || inputs_->context.shape() != inputs.context.shape()) {
        forget();
        const auto like = [this](const Buffer& one) {
            return device_.empty(one.dtype(), one.shape());
        };
        inputs_ = StepInputs{like(inputs.constants), like(inputs.context), like(inputs.modulation)};
        sources_ = {};
    }
    const std::array<std::pair<const Buffer*, const Buffer*>, 3> pairs{
        {{&inputs.constants, &inputs_->constants},
         {&inputs.context, &inputs_->context},
         {&inputs.modulation, &inputs_->modulation}}};
    for (std::size_t k = 0; k < pairs.size(); ++k) {
        const auto& [from, to] = pairs[k];
        if (sources_[k] != from->address()) device_.copy(*from, *to);  // the text's is the same
        sources_[k] = from->address();
    }
}

void RecordedSteps::forget() {
    graphs_ = {};
    ran_ = {};
    scratch_version_ = device_.scratch_version();
}

}  // namespace libsd35
