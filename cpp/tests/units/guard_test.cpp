#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "latent_guard.hpp"
#include "noise.hpp"

namespace libsd35 {
namespace {

const Manifest& manifest_of() {
    static const Manifest manifest = [] {
        Manifest own{};
        own.shift = 3.0;
        own.defaults.guidance = 4.5;
        return own;
    }();
    return manifest;
}

Request request_of(std::size_t images) {
    Request request{};
    request.prompts.assign(images, Prompt{"a star", "a star", "a star"});
    request.seeds.assign(images, 5);
    request.guidance.assign(images, 4.5);
    request.steps = 28;
    request.shift = 3.0;
    return request;
}

Buffer noisy(std::int64_t images) {
    Buffer latents = host_buffer(DType::float32, {images, 4, 8, 8});
    fill_noise(latents.data<float>(), latents.bytes() / 4, 3);
    return latents;
}

TEST(LatentGuard, ValuesThatAreNotFiniteAreFoundInEveryRun) {
    Request request = request_of(3);
    request.steps = 1;
    LatentGuard guard(std::nullopt, manifest_of(), request);
    const Buffer latents = noisy(3);
    guard.look(0, 0.5, latents);
    EXPECT_TRUE(guard.anomalies().empty());
    latents.row(1).data<float>()[7] = std::numeric_limits<float>::quiet_NaN();
    latents.row(2).data<float>()[255] = -std::numeric_limits<float>::infinity();
    guard.look(1, 0.25, latents);
    ASSERT_EQ(guard.anomalies().size(), 2U);
    const Anomaly& first = guard.anomalies().at(1);
    EXPECT_FALSE(first.finite);
    EXPECT_EQ(first.step, 1U);
    EXPECT_EQ(first.text(), "anomaly at step 2 (sigma 0.250), seed 5, prompt " + first.prompt +
                                ": latents are not finite");
    EXPECT_EQ(first.prompt.size(), 12U);
}

TEST(LatentGuard, LargeValuesAreFinite) {
    const Request request = request_of(1);
    LatentGuard guard(std::nullopt, manifest_of(), request);
    const Buffer latents = noisy(1);
    latents.data<float>()[0] = std::numeric_limits<float>::max();
    guard.look(0, 0.5, latents);
    EXPECT_TRUE(guard.anomalies().empty());
}

TEST(LatentGuard, WhatIsUsualIsMeasuredOrTheBundlesOwn) {
    Manifest manifest = manifest_of();
    Request request = request_of(2);
    request.guidance = {7.0, 7.1};
    EXPECT_TRUE(is_usual(manifest, request, 0));
    EXPECT_FALSE(is_usual(manifest, request, 1));
    manifest.defaults.guidance = 8.0;
    EXPECT_TRUE(is_usual(manifest, request, 1));
    request.shift = 6.5;
    EXPECT_FALSE(is_usual(manifest, request, 0));
    manifest.shift = 6.5;
    EXPECT_TRUE(is_usual(manifest, request, 0));
    request.shift = 0.9;
    EXPECT_FALSE(is_usual(manifest, request, 0));
}

TEST(LatentGuard, AnomaliesAreCountedFromThePartsFirstImage) {
    const Request request = request_of(3);
    LatentGuard guard(std::nullopt, manifest_of(), request);
    const Buffer latents = noisy(3);
    latents.row(2).data<float>()[0] = NAN;
    guard.look(0, 0.5, latents);
    EXPECT_TRUE(guard.within({0, 2}).empty());
    ASSERT_EQ(guard.within({1, 2}).size(), 1U);
    EXPECT_EQ(guard.within({1, 2}).front().image, 1U);
}

}  // namespace
}  // namespace libsd35
