// Pictures as PNG.
#pragma once

#include <cstdint>
#include <string>

namespace server {

// The bytes of a PNG file of RGB pixels. Throws std::runtime_error.
std::string png_of(const std::uint8_t* pixels, std::uint32_t width, std::uint32_t height);

std::string base64(const std::string& bytes);

}  // namespace server
