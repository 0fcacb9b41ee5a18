// PyTorch's CPU random normals, as docs/bundle-format.md specifies them to the bit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace libsd35 {

// Writes `count` standard normals, at least 16, of a seed whose low 32 bits count.
void fill_noise(float* values, std::size_t count, std::uint64_t seed);

}  // namespace libsd35
