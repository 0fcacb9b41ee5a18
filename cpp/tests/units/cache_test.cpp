// The cache that is bounded in bytes.
#include "byte_cache.hpp"

#include <gtest/gtest.h>

#include <string>

namespace libsd35 {
namespace {

using Cache = ByteCache<std::string, int>;

std::shared_ptr<const int> value() {
    return std::make_shared<const int>(7);
}

TEST(ByteCache, ForgetsWhatWasNotUsedForLongest) {
    Cache cache(100);
    cache.put("a", value(), 40);
    cache.put("b", value(), 40);
    EXPECT_NE(cache.get("a"), nullptr);
    cache.put("c", value(), 40);
    EXPECT_NE(cache.get("a"), nullptr);
    EXPECT_NE(cache.get("c"), nullptr);
    EXPECT_EQ(cache.get("b"), nullptr);
}

TEST(ByteCache, ReplacingCountsOnce) {
    Cache cache(100);
    for (int i = 0; i < 5; ++i) cache.put("a", value(), 40);
    cache.put("b", value(), 40);
    EXPECT_NE(cache.get("a"), nullptr);
}

TEST(ByteCache, WhatIsLargerAloneIsNotKept) {
    Cache cache(0);
    cache.put("a", value(), 40);
    EXPECT_EQ(cache.get("a"), nullptr);
}

}  // namespace
}  // namespace libsd35
