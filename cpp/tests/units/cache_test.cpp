// The cache of features, and slots of the host.
#include <gtest/gtest.h>

#include "text_features.hpp"

namespace libsd35 {
namespace {

SharedFeatures features(std::int64_t floats) {
    return std::make_shared<TextFeatures>(
        TextFeatures{host_zeros(DType::float32, {floats, 1}), host_zeros(DType::float32, {1}), {}});
}

TEST(FeatureCache, ForgetsWhatWasNotUsedForLongest) {
    FeatureCache cache(100);
    cache.put({"a", 1}, features(9));  // 40 bytes
    cache.put({"b", 1}, features(9));
    EXPECT_NE(cache.get({"a", 1}), nullptr);
    cache.put({"c", 1}, features(9));
    EXPECT_NE(cache.get({"a", 1}), nullptr);
    EXPECT_EQ(cache.get({"b", 1}), nullptr);
    EXPECT_EQ(cache.get({"a", 2}), nullptr);
}

TEST(FeatureCache, ReplacingCountsOnce) {
    FeatureCache cache(100);
    for (int i = 0; i < 5; ++i) cache.put({"a", 1}, features(9));
    cache.put({"b", 1}, features(9));
    EXPECT_NE(cache.get({"a", 1}), nullptr);
}

TEST(FeatureCache, WhatIsLargerAloneIsNotKept) {
    FeatureCache cache(0);
    cache.put({"a", 1}, features(9));
    EXPECT_EQ(cache.get({"a", 1}), nullptr);
}

}  // namespace
}  // namespace libsd35
