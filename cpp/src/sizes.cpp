#include "sizes.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "error.hpp"
#include "source_pictures.hpp"

namespace libsd35 {
namespace {

// No side of a picture is larger.
constexpr std::uint64_t largest = std::numeric_limits<std::int32_t>::max();

std::string list_of(const std::uint64_t shape[4]) {
    std::string text;
    for (std::size_t i = 0; i < 4; ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    return "[" + text + "]";
}

}  // namespace

void check_count(std::int64_t count, const Manifest& manifest) {
    const auto [low, high] = manifest.ranges.batch;
    if (count >= low && count <= high) return;
    throw usage_error(std::to_string(count) + " images at once, this bundle draws " +
                          std::to_string(low) + " to " + std::to_string(high),
                      "draw " + std::to_string(std::clamp(count, low, high)) +
                          ", or build with: --batch " + std::to_string(low) + ":" +
                          std::to_string(std::max(count, high)));
}

void check_size(std::int64_t width, std::int64_t height, const Manifest& manifest) {
    const Ranges& ranges = manifest.ranges;
    const auto [low, high] = ranges.size;
    const auto nearest = [&, low = low, high = high](std::int64_t value) {
        const auto step = static_cast<double>(ranges.size_step);
        // Ties to even, as the usual rounding mode has it.
        const double steps = std::nearbyint(static_cast<double>(value) / step);
        return std::clamp(static_cast<std::int64_t>(steps) * ranges.size_step, low, high);
    };
    if (nearest(width) == width && nearest(height) == height) return;
    throw usage_error("size " + size_text(width, height) + " is not in " + std::to_string(low) +
                          " to " + std::to_string(high) + " in steps of " +
                          std::to_string(ranges.size_step),
                      "the nearest is " + size_text(nearest(width), nearest(height)));
}

Buffer check_latents(const float* latents, const std::uint64_t shape[4], const Manifest& manifest) {
    const auto channels = static_cast<std::uint64_t>(manifest.latent_channels);
    const bool sized = std::all_of(shape, shape + 4,
                                   [](std::uint64_t side) { return side >= 1 && side <= largest; });
    if (!sized || shape[1] != channels) {
        throw usage_error("latents are float32 " + list_of(shape) + ", not float32 [images, " +
                          std::to_string(channels) + ", height, width]");
    }
    check_size(static_cast<std::int64_t>(shape[3]) * manifest.latent_scale,
               static_cast<std::int64_t>(shape[2]) * manifest.latent_scale, manifest);
    Buffer own = host_buffer(DType::float32, {shape, shape + 4});
    std::memcpy(own.address(), latents, own.bytes());
    const auto* const first = own.data<float>();
    if (!std::all_of(first, first + own.bytes() / sizeof(float),
                     [](float value) { return std::isfinite(value); })) {
        throw usage_error("latents are not finite", "look at what made them");
    }
    return own;
}

}  // namespace libsd35
