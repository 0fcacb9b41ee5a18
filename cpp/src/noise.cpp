#include "noise.hpp"

#include <array>
#include <cmath>
#include <random>

#include "error.hpp"

namespace libsd35 {
namespace {

constexpr std::size_t block = 16;
constexpr std::size_t half = block / 2;

// 2 π, rounded to float32 first.
constexpr auto turn = static_cast<float>(2.0 * 3.141592653589793);

// Its seeding is the authors' init_genrand, its words are theirs: the standard says so.
using Generator = std::mt19937;

// In [0, 1): the low 24 bits of a word.
float uniform(Generator& generator) {
    const auto word = static_cast<std::uint32_t>(generator());
    return static_cast<float>(word & 0xFFFFFFU) * 0x1p-24F;
}

// Box and Muller's: eight radii, then eight angles, to sixteen normals in their place.
void to_normals(float* values) {
    for (std::size_t j = 0; j < half; ++j) {
        const auto logarithm = static_cast<float>(std::log(double{1.0F - values[j]}));
        // The root of a float32 in float64, rounded, is the root in float32.
        const double radius{std::sqrt(-2.0F * logarithm)};
        const double angle{turn * values[j + half]};
        values[j] = static_cast<float>(radius * std::cos(angle));
        values[j + half] = static_cast<float>(radius * std::sin(angle));
    }
}

void fill_block(float* values, Generator& generator) {
    for (std::size_t i = 0; i < block; ++i) values[i] = uniform(generator);
    to_normals(values);
}

}  // namespace

void fill_noise(float* values, std::size_t count, std::uint64_t seed) {
    if (count < block) {
        throw bundle_error("noise needs at least 16 values, not " + std::to_string(count),
                           "draw a larger size");
    }
    Generator generator(static_cast<std::uint32_t>(seed));
    for (std::size_t i = 0; i < count; ++i) values[i] = uniform(generator);
    for (std::size_t i = 0; i + block <= count; i += block) to_normals(values + i);
    if (count % block != 0) fill_block(values + (count - block), generator);
}

}  // namespace libsd35
