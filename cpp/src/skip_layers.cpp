#include "skip_layers.hpp"

#include <algorithm>

#include "arguments.hpp"
#include "error.hpp"

namespace libsd35 {

bool SkipLayers::counts(std::int64_t step, std::int64_t steps) const {
    const auto all = static_cast<double>(steps);
    const auto own = static_cast<double>(step);
    return all * start < own && own < all * stop;
}

std::optional<SkipLayers> skip_layers_of(const Manifest& manifest, const sd35_request& asked) {
    SkipLayers skip{{},
                    number("skip_layer_guidance_scale", asked.skip_layer_guidance_scale, -100, 100),
                    number("skip_layer_guidance_start", asked.skip_layer_guidance_start, 0, 1),
                    number("skip_layer_guidance_stop", asked.skip_layer_guidance_stop, 0, 1)};
    const std::int64_t* const layers = asked.skip_guidance_layers;
    if (layers == nullptr) {
        if (asked.skip_guidance_layer_count == 0) return std::nullopt;
        throw usage_error("skip_guidance_layers is NULL");
    }
    const auto count = layer_count(manifest);
    if (!count) {
        throw usage_error("this bundle was built without skip-layer guidance",
                          "leave out skip_guidance_layers, or build with: --skip-layer-guidance");
    }
    for (std::size_t i = 0; i < asked.skip_guidance_layer_count; ++i) {
        const std::string name = "skip_guidance_layers[" + std::to_string(i) + "]";
        skip.layers.push_back(whole(name, layers[i], 0, *count - 1));
    }
    std::sort(skip.layers.begin(), skip.layers.end());
    skip.layers.erase(std::unique(skip.layers.begin(), skip.layers.end()), skip.layers.end());
    return skip;
}

std::optional<std::int64_t> layer_count(const Manifest& manifest) {
    const Component* denoiser = manifest.component("denoiser");
    if (denoiser == nullptr || !manifest.skip_layer_guidance) return std::nullopt;
    return std::get<std::int64_t>(denoiser->input("layer_mask")->shape.at(1));
}

std::vector<std::vector<float>> skip_scales(const Skips& skips, const std::vector<double>& guidance,
                                            std::int64_t steps) {
    std::vector<std::vector<float>> scales(static_cast<std::size_t>(steps),
                                           std::vector<float>(skips.size()));
    for (std::size_t image = 0; image < skips.size(); ++image) {
        if (!skips[image] || guidance[image] == 1.0) continue;
        for (std::int64_t step = 0; step < steps; ++step) {
            if (!skips[image]->counts(step, steps)) continue;
            scales[static_cast<std::size_t>(step)][image] = static_cast<float>(skips[image]->scale);
        }
    }
    return scales;
}

Buffer layer_masks(const Skips& skips, std::int64_t count) {
    const auto images = static_cast<std::int64_t>(skips.size());
    Buffer masks = host_buffer(DType::float32, {images, count});
    std::fill_n(masks.data<float>(), images * count, 1.0F);
    for (std::int64_t image = 0; image < images; ++image) {
        const auto& own = skips[static_cast<std::size_t>(image)];
        if (!own) continue;
        for (const std::int64_t layer : own->layers) {
            // A fallback may have fewer than the bundle that the request was made for.
            if (layer >= count) {
                throw bundle_error("the denoiser has no layer " + std::to_string(layer),
                                   "build the fallback with the same model and options");
            }
            masks.row(image).data<float>()[layer] = 0.0F;
        }
    }
    return masks;
}

}  // namespace libsd35
