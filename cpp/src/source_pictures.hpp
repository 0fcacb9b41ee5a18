// Pictures that a request starts from: their pixels, and which of them are drawn anew.
#pragma once

#include <sd35/sd35.h>

#include <cstdint>
#include <string>

#include "buffer.hpp"
#include "manifest.hpp"

namespace libsd35 {

// 128x64
std::string size_text(std::int64_t width, std::int64_t height);

// A picture once for each image: uint8 [count, H, W, 3].
Buffer repeated_picture(const std::uint8_t* pixels, std::int64_t width, std::int64_t height,
                        std::size_t count);

// Pixels of a request's picture, once for each image: uint8 [count, H, W, 3]; empty where there is
// none.
Buffer pixels_of(const sd35_request& asked, std::size_t count);

// Which pixels of the picture, or of what latents are of, are drawn anew: uint8 [H, W], 0 or 1;
// empty where all are. Throws Error: a mask of another size than this, or one that leaves nothing
// to be drawn.
Buffer mask_of(const Manifest& manifest, const sd35_request& asked, std::int64_t width,
               std::int64_t height);

// Which latent pixels are drawn anew, of each image: those whose first pixel is. float32
// [count, 1, H / scale, W / scale], 0 or 1.
Buffer latent_mask(const Buffer& mask, std::int64_t scale, std::int64_t count);

// Pictures [B, H, W, 3] whose pixels outside of the mask are the source's, of the same shape.
Buffer pasted(const Buffer& images, const Buffer& source, const Buffer& mask);

}  // namespace libsd35
