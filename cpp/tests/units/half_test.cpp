#include "half.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstring>

namespace libsd35 {
namespace {

TEST(Half, EveryValueComesBack) {
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        const auto half = static_cast<std::uint16_t>(bits);
        const float value = from_half(half);
        if (std::isnan(value)) {
            EXPECT_TRUE(std::isnan(from_half(to_half(value))));
        } else {
            ASSERT_EQ(to_half(value), half) << value;
        }
    }
}

TEST(Half, RoundsToNearestTiesToEven) {
    for (std::uint16_t bits = 0; bits < 0x7BFF; ++bits) {
        const float low = from_half(bits);
        const float high = from_half(static_cast<std::uint16_t>(bits + 1));
        const float middle = low + (high - low) / 2;  // exact
        const auto even = static_cast<std::uint16_t>(bits + (bits & 1));
        ASSERT_EQ(to_half(middle), even);
        ASSERT_EQ(to_half(std::nextafter(middle, 0.0F)), bits);
        ASSERT_EQ(to_half(std::nextafter(middle, high)), bits + 1);
        ASSERT_EQ(to_half(-middle), 0x8000 | even);
    }
}

TEST(Half, LargeValuesAreInfinite) {
    EXPECT_EQ(to_half(65519.0F), 0x7BFF);
    EXPECT_EQ(to_half(65520.0F), 0x7C00);
    EXPECT_EQ(to_half(1e30F), 0x7C00);
    EXPECT_EQ(to_half(-INFINITY), 0xFC00);
    EXPECT_EQ(to_half(1e-30F), 0);
}

TEST(Half, ConvertsBothWays) {
    const std::array<float, 3> wide{1.0F, -2.5F, 65536.0F};
    std::array<std::uint16_t, 3> narrow{};
    std::array<float, 3> back{};
    convert(reinterpret_cast<const std::byte*>(wide.data()), DType::float32,
            reinterpret_cast<std::byte*>(narrow.data()), DType::float16, wide.size());
    EXPECT_EQ(narrow, (std::array<std::uint16_t, 3>{0x3C00, 0xC100, 0x7C00}));
    convert(reinterpret_cast<const std::byte*>(narrow.data()), DType::float16,
            reinterpret_cast<std::byte*>(back.data()), DType::float32, back.size());
    EXPECT_EQ(back[1], -2.5F);
    EXPECT_TRUE(std::isinf(back[2]));
}

}  // namespace
}  // namespace libsd35
