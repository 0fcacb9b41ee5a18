#include "control_steps.hpp"

#include <algorithm>

#include "components.hpp"

namespace libsd35 {
namespace {

// SD3's patches are so many latent pixels wide and high.
constexpr std::int64_t patch = 2;

const Port& residuals_of(const Manifest& manifest, const std::string& net) {
    return *manifest.component(control_part(net))->output("next_residuals");
}

}  // namespace

Buffer no_residuals(const Manifest& manifest, Device& device) {
    if (!manifest.takes_controls) return {};
    const Port& port = *manifest.component("denoiser")->input(residuals_port);
    const Shape shape = port.resolve({{"residual_samples", 1}, {"residual_pixels", 1}});
    return device.upload(host_zeros(port.dtype, shape));
}

ControlRun::ControlRun(Device& device, const Manifest& manifest, const ControlUses& uses,
                       const std::vector<Buffer>& hints, std::size_t steps)
    : device_(device),
      steps_(steps),
      nothing_(no_residuals(manifest, device)),
      dtype_(residuals_of(manifest, uses.front().name).dtype) {
    for (std::size_t i = 0; i < uses.size(); ++i) {
        const auto images = static_cast<std::int64_t>(uses[i].scales.size());
        const Buffer scale = host_buffer(DType::float32, {images});
        std::copy(uses[i].scales.begin(), uses[i].scales.end(), scale.data<float>());
        nets_.push_back({uses[i], device.upload(hints[i]), device.upload(scale), {}, nullptr});
    }
    const Shape& hint = hints.front().shape();
    shape_ = residuals_of(manifest, uses.front().name)
                 .resolve({{"samples", manifest.guided ? 2 * hint[0] : hint[0]},
                           {"pixels", (hint[2] / patch) * (hint[3] / patch)}});
}

void ControlRun::condition(const ConditioningMeans& means,
                           const std::vector<SharedFeatures>& features,
                           const std::vector<float>& timesteps) {
    std::vector<std::string> loop{"denoiser"};
    for (const Net& net : nets_) loop.push_back(control_part(net.use.name));
    for (Net& net : nets_) {
        std::vector<float> own;
        for (std::size_t i = 0; i < steps_; ++i) {
            if (net.counts(i, steps_)) own.push_back(timesteps[i]);
        }
        net.conditioning.emplace(
            means, ConditioningTask{control_conditioner(net.use.name), features, own, {}, loop});
    }
}

void ControlRun::open(EngineSet& engines) {
    for (Net& net : nets_) net.session = &engines.use(control_part(net.use.name));
}

bool ControlRun::counts(std::size_t step) const {
    return std::any_of(nets_.begin(), nets_.end(),
                       [&](const Net& net) { return net.counts(step, steps_); });
}

void ControlRun::run(std::size_t step, const Buffer& latents, const Buffer& out) {
    std::vector<Net*> nets;
    for (Net& net : nets_) {
        if (net.counts(step, steps_)) nets.push_back(&net);
    }
    Buffer before = nothing_;
    for (std::size_t i = 0; i < nets.size(); ++i) {
        const Buffer target = i + 1 == nets.size() ? out : spare(i % 2);
        nets[i]->session->run(feed_of(*nets[i], latents, before), {{"next_residuals", target}});
        before = target;
    }
}

bool ControlRun::Net::counts(std::size_t step, std::size_t steps) const {
    return use.counts(static_cast<std::int64_t>(step), static_cast<std::int64_t>(steps));
}

Feed ControlRun::feed_of(Net& net, const Buffer& latents, const Buffer& before) const {
    const Conditioning told = net.conditioning->next();
    Feed feed{{"latents", latents},
              {"hint", net.hint},
              {"scale", net.scale},
              {"modulation", told.modulation},
              {residuals_port, before}};
    if (told.context) feed.emplace_back("context", told.context);
    return feed;
}

const Buffer& ControlRun::spare(std::size_t number) {
    while (between_.size() <= number) between_.push_back(device_.empty(dtype_, shape_));
    return between_[number];
}

}  // namespace libsd35
