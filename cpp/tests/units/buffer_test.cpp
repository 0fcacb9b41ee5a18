#include "buffer.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>

#include "error.hpp"

namespace libsd35 {
namespace {

Buffer counting(Shape shape) {
    Buffer buffer = host_buffer(DType::float32, std::move(shape));
    std::iota(buffer.data<float>(), buffer.data<float>() + buffer.bytes() / 4, 0.0F);
    return buffer;
}

TEST(Buffer, RowsShareTheMemory) {
    const Buffer buffer = counting({4, 2, 3});
    EXPECT_EQ(buffer.row(2).data<float>()[1], 13.0F);
    EXPECT_EQ(buffer.row(2).shape(), (Shape{2, 3}));
    EXPECT_EQ(buffer.rows(1, 2).shape(), (Shape{2, 2, 3}));
    EXPECT_EQ(buffer.rows(1, 2).row(1).data<float>()[0], 12.0F);
    EXPECT_EQ(buffer.rows(3, 1).reshape({6}).data<float>()[5], 23.0F);
    EXPECT_EQ(host_copy(buffer.row(3)).data<float>()[0], 18.0F);
}

TEST(Buffer, TheMemoryLivesAsLongAsARow) {
    const Buffer row = counting({2, 2}).row(1);
    EXPECT_EQ(row.data<float>()[0], 2.0F);
}

TEST(Buffer, WhatIsOutsideIsRefused) {
    const Buffer buffer = counting({4, 2});
    EXPECT_THROW(buffer.row(4), Error);
    EXPECT_THROW(buffer.row(-1), Error);
    EXPECT_THROW(buffer.rows(2, 3), Error);
    EXPECT_THROW(buffer.reshape({3, 3}), std::invalid_argument);
}

TEST(Buffer, NoMemoryIsAsLargeAsAShapeCanSay) {
    const std::int64_t side = std::int64_t{1} << 31;
    EXPECT_THROW(host_buffer(DType::float32, {side, side, side}), Error);
    EXPECT_THROW(host_buffer(DType::float32, {side, side}), Error);
}

}  // namespace
}  // namespace libsd35
