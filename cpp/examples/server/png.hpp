// Pictures as PNG, and bytes as base64.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace server {

// The bytes of a PNG file of RGB pixels. Throws std::runtime_error.
std::string png_of(const std::uint8_t* pixels, std::uint32_t width, std::uint32_t height);

// Pixels of red, green, blue and alpha.
struct Rgba {
    std::uint32_t width;
    std::uint32_t height;
    std::vector<std::uint8_t> pixels;
    bool has_alpha;  // whether a pixel can be transparent
};

// Those of a PNG file; nothing where it is none, or larger than any picture that is drawn.
std::optional<Rgba> read_png(std::string_view bytes);

std::string base64(const std::string& bytes);

// The bytes; nothing where it is no base64.
std::optional<std::string> from_base64(std::string_view text);

}  // namespace server
