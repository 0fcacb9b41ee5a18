// Skip-layer guidance: away from what the model draws without some of its blocks, with the
// arguments and the arithmetic of diffusers' StableDiffusion3Pipeline.
#pragma once

#include <sd35/sd35.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "buffer.hpp"
#include "manifest.hpp"

namespace libsd35 {

// What an image has of it.
struct SkipLayers {
    std::vector<std::int64_t> layers;  // blocks that the third branch leaves out, ascending
    double scale;                      // of the difference
    double start;                      // fractions of the steps between which it counts, both
    double stop;                       // exclusive

    // Whether it does in a step of so many.
    bool counts(std::int64_t step, std::int64_t steps) const;
};

// Of each image; nothing is without.
using Skips = std::vector<std::optional<SkipLayers>>;

// The arguments, checked; nothing where no layers are named. Throws Error.
std::optional<SkipLayers> skip_layers_of(const Manifest& manifest, const sd35_request& asked);

// Blocks that a bundle's denoiser can skip; nothing where it skips none.
std::optional<std::int64_t> layer_count(const Manifest& manifest);

// How much each image has in each step, [steps][images]. Where its guidance is 1, there is none of
// this either.
std::vector<std::vector<float>> skip_scales(const Skips& skips, const std::vector<double>& guidance,
                                            std::int64_t steps);

// What the third branch computes of each image's blocks: float32 [images, count] of the host.
// Throws Error where a layer is none of these.
Buffer layer_masks(const Skips& skips, std::int64_t count);

}  // namespace libsd35
