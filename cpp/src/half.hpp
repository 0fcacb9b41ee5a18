// Conversion between float32 and float16, and of values from one type to another.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.hpp"

namespace libsd35 {

// To nearest, ties to even.
std::uint16_t to_half(float value);
float from_half(std::uint16_t bits);

// Copies values of float16 or float32, converted where the types differ.
void convert(const std::byte* from, DType from_type, std::byte* to, DType to_type,
             std::size_t count);

}  // namespace libsd35
