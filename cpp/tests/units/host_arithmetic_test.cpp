// docs/host-arithmetic.json, bit for bit.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "error.hpp"
#include "noise.hpp"
#include "schedule.hpp"

namespace libsd35 {
namespace {

using nlohmann::json;

const json& vectors() {
    static const json document = [] {
        std::ifstream stream(SD35_VECTORS);
        return json::parse(stream);
    }();
    return document;
}

double hexadecimal(const json& text) {
    return std::strtod(text.get_ref<const std::string&>().c_str(), nullptr);
}

std::vector<float> floats(const json& texts) {
    std::vector<float> values;
    for (const json& text : texts) values.push_back(static_cast<float>(hexadecimal(text)));
    return values;
}

std::vector<std::vector<float>> rows(const std::vector<Coefficients>& table) {
    std::vector<std::vector<float>> result;
    for (const Coefficients& row : table) result.emplace_back(row.begin(), row.end());
    return result;
}

TEST(HostArithmetic, Noise) {
    for (const json& one : vectors().at("noise")) {
        std::vector<float> values(one.at("count").get<std::size_t>());
        fill_noise(values.data(), values.size(), one.at("seed").get<std::uint64_t>());
        if (one.contains("values")) {
            EXPECT_EQ(values, floats(one.at("values")));
        } else {
            EXPECT_EQ(std::vector<float>(values.end() - 16, values.end()), floats(one.at("last")));
        }
    }
}

TEST(HostArithmetic, NoiseOfFewValuesIsRefused) {
    std::array<float, 15> values{};
    EXPECT_THROW(fill_noise(values.data(), values.size(), 0), Error);
}

TEST(HostArithmetic, Schedules) {
    for (const json& one : vectors().at("schedules")) {
        const double timesteps = one.at("num_train_timesteps");
        const std::vector<float> sigmas =
            make_sigmas(one.at("steps"), hexadecimal(one.at("shift")), timesteps);
        EXPECT_EQ(sigmas, floats(one.at("sigmas")));
        const std::vector<float> before(sigmas.begin(), sigmas.end() - 1);
        EXPECT_EQ(make_timesteps(before, timesteps), floats(one.at("timesteps")));
        for (const char* sampler : {"euler", "dpmpp-2m"}) {
            std::vector<std::vector<float>> expected;
            for (const json& row : one.at(sampler)) expected.push_back(floats(row));
            EXPECT_EQ(rows(coefficients(sampler, sigmas)), expected) << sampler;
        }
    }
}

TEST(HostArithmetic, Mix) {
    for (const json& one : vectors().at("mix")) {
        const auto value = [&](const char* name) {
            return static_cast<float>(hexadecimal(one.at(name)));
        };
        EXPECT_EQ(mix(value("noise"), value("encoded"), value("sigma")), value("latent"));
    }
}

TEST(HostArithmetic, FirstStepRoundsWhatRemainsUp) {
    EXPECT_EQ(first_step(9, 0.55), 4);
    EXPECT_EQ(first_step(9, 1.0), 0);
    EXPECT_EQ(first_step(10, 0.05), 9);
    EXPECT_EQ(first_step(10, 0.0), 10);
}

}  // namespace
}  // namespace libsd35
