// Sigma schedules and samplers, as docs/bundle-format.md specifies them to the bit.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

namespace libsd35 {

// One step's a, b, c of: next = a * latents + b * denoised + c * previous_denoised.
using Coefficients = std::array<float, 3>;

// From 1 down to 0: steps + 1 noise levels.
std::vector<float> make_sigmas(std::int64_t steps, double shift, double train_timesteps);

// What the conditioner takes for sigmas.
std::vector<float> make_timesteps(const std::vector<float>& sigmas, double train_timesteps);

// Names of the samplers.
inline constexpr std::array<std::string_view, 2> samplers{"euler", "dpmpp-2m"};

bool is_sampler(std::string_view name);

// One row for each step of the sigmas, of which there is one more.
std::vector<Coefficients> coefficients(std::string_view sampler, const std::vector<float>& sigmas);

// How many steps of image to image are left out at its start.
std::int64_t first_step(std::int64_t steps, double strength);

// Latents of a picture with noise, where image to image begins; every operation is rounded.
float mix(float noise, float encoded, float sigma);

}  // namespace libsd35
