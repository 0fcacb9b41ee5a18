#include "half.hpp"

#include <cmath>
#include <cstring>

namespace libsd35 {
namespace {

std::uint32_t bits_of(float value) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

float float_of(std::uint32_t bits) {
    float value = 0;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Without its `shift` lowest bits, rounded to nearest, ties to even.
std::uint32_t rounded(std::uint32_t bits, std::uint32_t shift) {
    const std::uint32_t half_less_one = (1U << (shift - 1)) - 1;
    return (bits + half_less_one + (bits >> shift & 1U)) >> shift;
}

}  // namespace

std::uint16_t to_half(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = bits >> 16 & 0x8000U;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    std::uint32_t result = 0;
    if (magnitude > 0x7F800000U) {
        result = 0x7E00U | (magnitude >> 13 & 0x1FFU);  // not a number
    } else if (magnitude >= 0x47800000U) {
        result = 0x7C00U;  // 65536 and more
    } else if (magnitude >= 0x38800000U) {
        result = rounded(magnitude - 0x38000000U, 13);  // a carry gives infinity, as it should
    } else if (magnitude >= 0x33000000U) {
        // Below 2^-14 the exponent is fixed: the point moves.
        const std::uint32_t shift = 126U - (magnitude >> 23);
        result = rounded((magnitude & 0x7FFFFFU) | 0x800000U, shift);
    }
    return static_cast<std::uint16_t>(sign | result);
}

float from_half(std::uint16_t bits) {
    const std::uint32_t sign = (bits & 0x8000U) << 16;
    const std::uint32_t exponent = bits >> 10 & 0x1FU;
    const std::uint32_t fraction = bits & 0x3FFU;
    if (exponent == 0x1F) return float_of(sign | 0x7F800000U | fraction << 13);
    if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float tiny = static_cast<float>(fraction) * 0x1p-24F;
    return float_of(sign | bits_of(tiny));
}

void convert(const std::byte* from, DType from_type, std::byte* to, DType to_type,
             std::size_t count) {
    if (from_type == to_type) {
        std::memcpy(to, from, count * item_bytes(from_type));
        return;
    }
    const bool narrows = to_type == DType::float16;
    for (std::size_t i = 0; i < count; ++i) {
        std::uint16_t narrow = 0;
        float wide = 0;
        if (narrows) {
            std::memcpy(&wide, from + i * sizeof wide, sizeof wide);
            narrow = to_half(wide);
            std::memcpy(to + i * sizeof narrow, &narrow, sizeof narrow);
        } else {
            std::memcpy(&narrow, from + i * sizeof narrow, sizeof narrow);
            wide = from_half(narrow);
            std::memcpy(to + i * sizeof wide, &wide, sizeof wide);
        }
    }
}

}  // namespace libsd35
