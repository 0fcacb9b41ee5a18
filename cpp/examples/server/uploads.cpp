#include "uploads.hpp"

#include <algorithm>

namespace server {
namespace {

constexpr std::uint8_t half = 128;

// Of a pixel, as PIL's mode L has it.
std::uint8_t grey(const std::uint8_t* pixel) {
    const std::uint32_t sum = 19595U * pixel[0] + 38470U * pixel[1] + 7471U * pixel[2] + 0x8000U;
    return static_cast<std::uint8_t>(sum >> 16);
}

std::size_t pixels_in(const Rgba& upload) {
    return upload.pixels.size() / 4;
}

}  // namespace

Rgba upload_of(std::string_view file, const std::string& field) {
    auto read = read_png(file);
    if (!read) throw BadRequest(field + " must be a PNG file");
    return std::move(*read);
}

Rgba upload_of_text(std::string_view text, const std::string& field) {
    constexpr std::string_view mark = ";base64,";
    const std::size_t data =
        text.substr(0, 5) == "data:" ? text.find(mark) : std::string_view::npos;
    if (data != std::string_view::npos) text.remove_prefix(data + mark.size());
    const auto file = from_base64(text);
    if (!file) throw BadRequest(field + " must be a PNG file in base64");
    return upload_of(*file, field);
}

sd35::Picture picture_of(const Rgba& upload) {
    sd35::Picture picture{upload.width, upload.height, {}};
    picture.pixels.reserve(3 * pixels_in(upload));
    for (std::size_t i = 0; i < pixels_in(upload); ++i) {
        const std::uint8_t* const pixel = upload.pixels.data() + 4 * i;
        const std::uint32_t alpha = pixel[3];
        for (std::size_t k = 0; k < 3; ++k) {
            const std::uint32_t sum = pixel[k] * alpha + 255U * (255U - alpha) + 127U;
            picture.pixels.push_back(static_cast<std::uint8_t>(sum / 255U));
        }
    }
    return picture;
}

sd35::Mask mask_of(const Rgba& upload) {
    sd35::Mask mask{upload.width, upload.height, {}};
    mask.pixels.reserve(pixels_in(upload));
    for (std::size_t i = 0; i < pixels_in(upload); ++i) {
        const std::uint8_t* const pixel = upload.pixels.data() + 4 * i;
        const bool drawn = upload.has_alpha ? pixel[3] < half : grey(pixel) >= half;
        mask.pixels.push_back(drawn ? 255 : 0);
    }
    return mask;
}

bool is_clear(const Rgba& upload) {
    const std::vector<std::uint8_t> mask =
        upload.has_alpha ? mask_of(upload).pixels : std::vector<std::uint8_t>();
    return std::find(mask.begin(), mask.end(), 255) != mask.end();
}

}  // namespace server
