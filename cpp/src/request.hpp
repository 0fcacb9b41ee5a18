// A checked request: what the caller asked for, filled with the bundle's defaults.
#pragma once

#include <sd35/sd35.h>

#include <cstdint>
#include <string>
#include <vector>

#include "adapters.hpp"
#include "buffer.hpp"
#include "controls.hpp"
#include "manifest.hpp"
#include "prompts.hpp"
#include "skip_layers.hpp"

namespace libsd35 {

inline constexpr std::uint32_t usual_prompt_chars = 10'000;

// One run: every list has one entry per image.
struct Request {
    std::vector<Prompt> prompts;
    std::vector<Prompt> negatives;
    std::vector<std::uint64_t> seeds;
    std::vector<double> guidance;
    std::int64_t steps;
    double shift;
    std::int64_t width;
    std::int64_t height;
    std::string sampler;
    std::int64_t t5_tokens;
    std::int64_t latent_scale;
    Buffer image;    // to start from, uint8 [B, H, W, 3]; empty where there is none
    Buffer latents;  // in place of it, float32 [B, C, h, w]; empty where there are none
    double strength;
    Buffer mask;  // uint8 [H, W], 1 where the picture is drawn anew; empty where all is
    bool paste;   // whether the rest is the picture's own in the end
    Skips skips;
    std::vector<Mix> adapters;
    ControlUses controls;  // which all images have
    bool decode;           // whether the result has images

    std::size_t count() const noexcept { return seeds.size(); }

    // Whether it starts from noise alone.
    bool from_noise() const noexcept { return !image && !latents; }

    // Sizes of the dynamic dimensions of the VAE and the denoiser.
    Dims dims() const;

    // Steps that are computed.
    std::int64_t drawn_steps() const;

    // Whether both can be drawn in one run, if their adapters fit together.
    bool joins(const Request& other) const;

    // What would draw the same images again, but for the picture started from: JSON.
    std::string parameters() const;
};

// Checks what a caller asks of a bundle. `shelf` has the adapters that there are, NULL where none
// is asked for. Throws Error; names the nearest value that works.
Request make_request(const Manifest& manifest, const sd35_request& asked,
                     std::uint32_t max_prompt_chars, AdapterShelf* shelf);

// The smallest batch of the usual size.
Request least_request(const Manifest& manifest);

// All images of requests that join, in order.
Request join_requests(const std::vector<const Request*>& requests);

}  // namespace libsd35
