#include "run_inputs.hpp"

#include <algorithm>

#include "adapters.hpp"
#include "control_steps.hpp"
#include "skip_layers.hpp"
#include "source_pictures.hpp"

namespace libsd35 {
namespace {

Buffer guidance_of(const Request& request) {
    Buffer values = host_buffer(DType::float32, {static_cast<std::int64_t>(request.count())});
    std::transform(request.guidance.begin(), request.guidance.end(), values.data<float>(),
                   [](double value) { return static_cast<float>(value); });
    return values;
}

// Without a mask all is drawn anew, and nothing is taken of a picture.
Feed inpainting_of(const Request& request, const Source& source) {
    const bool masked = request.mask && source.latents;
    const Shape& shape = source.noise.shape();
    Buffer mask;
    if (masked) {
        mask = latent_mask(request.mask, request.latent_scale, shape[0]);
    } else {
        mask = host_buffer(DType::float32, {shape[0], 1, shape[2], shape[3]});
        std::fill_n(mask.data<float>(), mask.bytes() / sizeof(float), 1.0F);
    }
    return {{"mask", mask},
            {"source", masked ? source.latents : host_zeros(DType::float32, shape)},
            {"source_noise", source.noise}};
}

}  // namespace

RunInputs run_inputs(Device& device, const Manifest& manifest, const Request& request,
                     const Source& source, const Feed& adapters) {
    RunInputs run;
    Feed own;
    if (manifest.guided) own.emplace_back("guidance", guidance_of(request));
    if (manifest.inpainting) {
        for (auto& input : inpainting_of(request, source)) own.push_back(std::move(input));
    }
    for (const auto& [name, array] : own) run.own.emplace_back(name, device.upload(array));
    for (const auto& input : adapters) {
        (input.first == adapter_scales ? run.own : run.shared).push_back(input);
    }
    if (const auto layers = layer_count(manifest)) {
        run.layer_mask = device.upload(layer_masks(request.skips, *layers));
    }
    run.no_residuals = no_residuals(manifest, device);
    run.guided = manifest.guided;
    return run;
}

}  // namespace libsd35
