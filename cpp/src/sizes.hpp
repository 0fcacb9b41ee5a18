// Sizes and batches that a bundle draws, and latents that are of such a size.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "manifest.hpp"

namespace libsd35 {

// Refuses what is not a batch of a bundle. Throw Error; name the nearest that is.
void check_count(std::int64_t count, const Manifest& manifest);

// Refuses a size in pixels that a bundle does not draw.
void check_size(std::int64_t width, std::int64_t height, const Manifest& manifest);

// A copy of latents of pictures that a bundle draws: float32 [images, channels, height, width],
// finite. Throws Error.
Buffer check_latents(const float* latents, const std::uint64_t shape[4], const Manifest& manifest);

}  // namespace libsd35
