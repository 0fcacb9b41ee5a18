#include "denoise_steps.hpp"

#include <algorithm>

namespace libsd35 {

bool Schedule::skips(std::size_t step) const {
    if (skip_guidance.empty()) return false;
    const std::vector<float>& scales = skip_guidance[step];
    return std::any_of(scales.begin(), scales.end(), [](float scale) { return scale != 0; });
}

std::vector<ConstantPort> constant_ports(const Schedule& schedule) {
    std::vector<ConstantPort> ports{{"sigma", 1}, {"coefficients", 3}};
    if (schedule.next_sigmas) ports.push_back({"next_sigma", 1});
    if (!schedule.skip_guidance.empty()) ports.push_back({"skip_guidance", 1});
    return ports;
}

Buffer step_constants(const Schedule& schedule, std::size_t images) {
    const std::size_t steps = schedule.coefficients.size();
    std::size_t values = 0;
    for (const ConstantPort& port : constant_ports(schedule)) {
        values += static_cast<std::size_t>(port.values);
    }
    Buffer constants = host_buffer(DType::float32, {static_cast<std::int64_t>(steps),
                                                    static_cast<std::int64_t>(values * images)});
    auto* place = constants.data<float>();
    for (std::size_t i = 0; i < steps; ++i) {
        place = std::fill_n(place, images, schedule.sigmas[i]);
        const Coefficients& row = schedule.coefficients[i];
        for (std::size_t k = 0; k < images; ++k) place = std::copy(row.begin(), row.end(), place);
        if (schedule.next_sigmas) place = std::fill_n(place, images, schedule.sigmas[i + 1]);
        if (schedule.skip_guidance.empty()) continue;
        const std::vector<float>& scales = schedule.skip_guidance[i];
        place = std::copy(scales.begin(), scales.end(), place);
    }
    return constants;
}

StepFeeder::StepFeeder(Device& device, std::int64_t count, const RunInputs& run,
                       std::vector<ConstantPort> constants)
    : device_(&device),
      count_(count),
      constants_(std::move(constants)),
      guided_(run.guided),
      fixed_(run.own),
      layer_mask_(run.layer_mask),
      no_residuals_(run.no_residuals) {
    fixed_.insert(fixed_.end(), run.shared.begin(), run.shared.end());
    if (!layer_mask_) return;
    // A device need not give an address for nothing.
    no_layers_ = device.empty(DType::float32, {1, layer_mask_.shape()[1]}).rows(0, 0);
}

Buffer StepFeeder::residuals(DType dtype, const Shape& shape) {
    if (residuals_.shape() != shape) residuals_ = device_->empty(dtype, shape);
    return residuals_;
}

Feed StepFeeder::ports(const StepInputs& inputs, StepKind kind) const {
    const std::int64_t samples = inputs.context.shape()[0];
    Feed feed = fixed_;
    feed.emplace_back("context", inputs.context.rows(samples - count_, count_));
    feed.emplace_back("modulation", inputs.modulation.rows(samples - count_, count_));
    std::int64_t first = 0;
    for (const ConstantPort& port : constants_) {
        const Buffer own = inputs.constants.rows(first, port.values * count_);
        feed.emplace_back(port.name, port.values == 1 ? own : own.reshape({count_, port.values}));
        first += port.values * count_;
    }
    if (guided_) {
        feed.emplace_back("uncond_context", inputs.context.rows(0, count_));
        feed.emplace_back("uncond_modulation", inputs.modulation.rows(0, count_));
    }
    if (layer_mask_) feed.emplace_back("layer_mask", kind.skipping ? layer_mask_ : no_layers_);
    if (no_residuals_) {
        feed.emplace_back(residuals_port, kind.controlled ? residuals_ : no_residuals_);
    }
    return feed;
}

void PingPong::compute(Session& session, std::size_t turn, Feed feed) const {
    const std::size_t other = 1 - turn;
    feed.emplace_back("latents", latents[turn]);
    feed.emplace_back("previous_denoised", denoised[other]);
    session.run(feed, {{"next_latents", latents[other]}, {"denoised", denoised[turn]}});
}

DirectSteps::DirectSteps(Device& device, Session& session, const Buffer& latents,
                         const RunInputs& run, std::vector<ConstantPort> constants)
    : session_(session), feeder_(device, latents.shape()[0], run, std::move(constants)) {
    const Shape& shape = latents.shape();
    // Copies: the CPU's buffers may share the memory of what they are made of.
    buffers_.latents = {device.upload(host_copy(latents)), device.empty(DType::float32, shape)};
    buffers_.denoised = {device.empty(DType::float32, shape),
                         device.upload(host_zeros(DType::float32, shape))};
}

StepOutputs DirectSteps::run(std::size_t index, const StepInputs& inputs, StepKind kind) {
    buffers_.compute(session_, index % 2, feeder_.ports(inputs, kind));
    return buffers_.outputs(index % 2);
}

RecordedSteps::RecordedSteps(Device& device, Session& session, const Shape& latents,
                             const RunInputs& run, std::vector<ConstantPort> constants)
    : device_(device), session_(session), scratch_version_(device.scratch_version()) {
    const auto like = [&](const Buffer& one) { return device.empty(one.dtype(), one.shape()); };
    for (std::size_t i = 0; i < 2; ++i) {
        buffers_.latents[i] = device.empty(DType::float32, latents);
        buffers_.denoised[i] = device.empty(DType::float32, latents);
    }
    copies_ = run;
    for (auto& [_, buffer] : copies_.own) buffer = like(buffer);
    if (run.layer_mask) copies_.layer_mask = like(run.layer_mask);
    feeder_ = StepFeeder(device, latents[0], copies_, std::move(constants));
}

RecordedSteps::~RecordedSteps() {
    try {
        device_.synchronize();
    } catch (const std::exception&) {
        // What failed was told as an error where it ran.
    }
}

void RecordedSteps::begin(const Buffer& latents, const RunInputs& run) {
    sources_ = {};
    device_.copy(device_.upload(latents), buffers_.latents[0]);
    device_.copy(device_.upload(host_zeros(DType::float32, latents.shape())), buffers_.denoised[1]);
    for (std::size_t i = 0; i < copies_.own.size(); ++i) {
        device_.copy(run.own.at(i).second, copies_.own[i].second);
    }
    if (run.layer_mask) device_.copy(run.layer_mask, copies_.layer_mask);
}

StepOutputs RecordedSteps::run(std::size_t index, const StepInputs& inputs, StepKind kind) {
    place(inputs);
    const std::size_t turn = index % 2;
    if (device_.scratch_version() != scratch_version_) forget();
    const auto compute = [&] { buffers_.compute(session_, turn, feeder_.ports(*inputs_, kind)); };
    Recording& own = recordings_[turn][(kind.skipping ? 1U : 0U) + (kind.controlled ? 2U : 0U)];
    if (own.graph == nullptr && own.ran) own.graph = device_.capture(compute);
    if (own.graph != nullptr) {
        own.graph->replay();
    } else {
        compute();
        own.ran = true;
    }
    return buffers_.outputs(turn);
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
    recordings_ = {};
    scratch_version_ = device_.scratch_version();
}

}  // namespace libsd35
