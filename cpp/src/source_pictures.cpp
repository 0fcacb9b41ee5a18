#include "source_pictures.hpp"

#include <algorithm>
#include <cstring>

#include "error.hpp"

namespace libsd35 {
namespace {

constexpr std::uint8_t half_light = 128;

bool is_drawn(const Buffer& mask, std::int64_t y, std::int64_t x) {
    return mask.data<std::uint8_t>()[y * mask.shape()[1] + x] != 0;
}

}  // namespace

std::string size_text(std::int64_t width, std::int64_t height) {
    return std::to_string(width) + "x" + std::to_string(height);
}

Buffer repeated_picture(const std::uint8_t* pixels, std::int64_t width, std::int64_t height,
                        std::size_t count) {
    Buffer all = host_buffer(DType::uint8, {static_cast<std::int64_t>(count), height, width, 3});
    const std::size_t one = all.bytes() / count;
    for (std::size_t i = 0; i < count; ++i) std::memcpy(all.address() + i * one, pixels, one);
    return all;
}

Buffer pixels_of(const sd35_request& asked, std::size_t count) {
    if (asked.image == nullptr) return {};
    return repeated_picture(asked.image, asked.image_width, asked.image_height, count);
}

Buffer mask_of(const Manifest& manifest, const sd35_request& asked, std::int64_t width,
               std::int64_t height) {
    if (asked.mask == nullptr) {
        if (asked.paste != 0) {
            throw usage_error("paste keeps what a mask leaves, and there is none", "give a mask");
        }
        return {};
    }
    if (!manifest.inpainting) {
        throw usage_error("this bundle was built without inpainting",
                          "leave out the mask, or build with: --inpainting");
    }
    if (asked.image == nullptr && asked.latents == nullptr) {
        throw usage_error("a mask needs the picture that it is of", "give it as image, too");
    }
    if (asked.mask_width != width || asked.mask_height != height) {
        throw usage_error("the mask is " + size_text(asked.mask_width, asked.mask_height) +
                              ", the image is " + size_text(width, height),
                          "give the mask at the size of the image");
    }
    Buffer mask = host_buffer(DType::uint8, {asked.mask_height, asked.mask_width});
    std::transform(
        asked.mask, asked.mask + mask.bytes(), mask.data<std::uint8_t>(),
        [](std::uint8_t light) { return static_cast<std::uint8_t>(light >= half_light); });
    const Buffer latent = latent_mask(mask, manifest.latent_scale, 1);
    const auto* const first = latent.data<float>();
    if (std::none_of(first, first + latent.bytes() / sizeof(float),
                     [](float value) { return value != 0; })) {
        throw usage_error("the mask leaves nothing to be drawn",
                          "make it white where the picture is to change");
    }
    return mask;
}

Buffer latent_mask(const Buffer& mask, std::int64_t scale, std::int64_t count) {
    const std::int64_t height = mask.shape()[0] / scale;
    const std::int64_t width = mask.shape()[1] / scale;
    Buffer result = host_buffer(DType::float32, {count, 1, height, width});
    auto* place = result.data<float>();
    for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t y = 0; y < height; ++y) {
            for (std::int64_t x = 0; x < width; ++x) {
                *place++ = is_drawn(mask, y * scale, x * scale) ? 1.0F : 0.0F;
            }
        }
    }
    return result;
}

Buffer pasted(const Buffer& images, const Buffer& source, const Buffer& mask) {
    if (images.shape() != source.shape()) {
        // An engine that was built for one size may give others than that asked for.
        throw bundle_error("pictures of shape " + to_text(images.shape()) + " were drawn, not " +
                               to_text(source.shape()),
                           "build the bundle again");
    }
    Buffer result = host_copy(source);
    const std::size_t pixels = mask.bytes();
    for (std::size_t i = 0; i < result.bytes() / 3; ++i) {
        if (mask.data<std::uint8_t>()[i % pixels] == 0) continue;
        std::memcpy(result.address() + 3 * i, images.address() + 3 * i, 3);
    }
    return result;
}

}  // namespace libsd35
