// Parts of libsd35 by themselves, for tests in other languages: reads a JSON document from the
// standard input, writes another to the standard output.
//
//     probe plan      [{"engines": [...], "budget": N or null, "reserve": N}, ...] → plans
//     probe tokens    {"bundle": PATH, "tokenizer": NAME, "length": N, "texts": [...]}
//                     → ids, counts
//     probe weights   [text, ...] → parts and their weights, or why there are none
//     probe adapters  [PATH, ...] → the rank of each, or why it is none
//     probe noise     {"seed": N, "count": N} → values
//     probe half      [bits of float32, ...] → bits of float16
//     probe backends  {} → for each kind of engine, what the planner has to know of it
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "adapter.hpp"
#include "backends.hpp"
#include "bundle.hpp"
#include "error.hpp"
#include "half.hpp"
#include "noise.hpp"
#include "residency.hpp"
#include "token_weights.hpp"
#include "tokenizer.hpp"

namespace {

using nlohmann::json;

libsd35::Footprint footprint_of(const json& fields) {
    libsd35::Footprint engine{};
    engine.name = fields.at("name");
    engine.weight_bytes = fields.at("weight_bytes");
    engine.activation_bytes = fields.at("activation_bytes");
    engine.runs = fields.at("runs");
    if (!fields.at("stream_bytes").is_null()) engine.stream_bytes = fields.at("stream_bytes");
    engine.keeps_activations = fields.at("keeps_activations");
    engine.every_step = fields.at("every_step");
    return engine;
}

json plan_one(const json& asked) {
    std::vector<libsd35::Footprint> engines;
    for (const json& fields : asked.at("engines")) engines.push_back(footprint_of(fields));
    std::optional<std::uint64_t> budget;
    if (!asked.at("budget").is_null()) budget = asked.at("budget").get<std::uint64_t>();
    const libsd35::Residency plan =
        libsd35::plan_residency(engines, budget, asked.at("reserve").get<std::uint64_t>());
    json placements = json::array();
    for (const libsd35::Placement& place : plan.placements) {
        placements.push_back(
            {libsd35::name_of(place.kind), place.device_bytes, place.bus_bytes, place.peak_bytes});
    }
    return {{"placements", placements},
            {"resident_bytes", plan.resident_bytes},
            {"bus_bytes", plan.bus_bytes},
            {"peak_bytes", plan.peak_bytes},
            {"fits", plan.fits}};
}

json plan(const json& asked) {
    json plans = json::array();
    for (const json& one : asked) plans.push_back(plan_one(one));
    return plans;
}

json tokens(const json& asked) {
    const libsd35::Bundle bundle(asked.at("bundle").get<std::string>(), false);
    const auto& records = bundle.manifest().tokenizers;
    libsd35::PromptTokenizer tokenizer(bundle,
                                       records.at(asked.at("tokenizer").get<std::string>()));
    const std::int64_t length = asked.at("length");
    std::vector<std::int64_t> ids(static_cast<std::size_t>(length));
    json result = json::array();
    for (const json& text : asked.at("texts")) {
        const std::int64_t count =
            tokenizer.encode(text.get_ref<const std::string&>(), length, ids.data());
        result.push_back({ids, count});
    }
    return result;
}

json weights(const json& asked) {
    json result = json::array();
    for (const json& text : asked) {
        try {
            json parts = json::array();
            for (const auto& part : libsd35::weighted_parts(text.get_ref<const std::string&>())) {
                parts.push_back({part.text, part.weight});
            }
            result.push_back(parts);
        } catch (const libsd35::Error& error) {
            result.push_back(error.message());
        }
    }
    return result;
}

// Of each file the rank, or why it is none.
json adapters(const json& asked) {
    json result = json::array();
    for (const json& path : asked) {
        try {
            result.push_back(libsd35::read_adapter(path.get<std::string>()).rank());
        } catch (const libsd35::Error& error) {
            result.push_back(error.message());
        }
    }
    return result;
}

json noise(const json& asked) {
    std::vector<float> values(asked.at("count").get<std::size_t>());
    libsd35::fill_noise(values.data(), values.size(), asked.at("seed").get<std::uint64_t>());
    return values;
}

json backend_rows(const json&) {
    json rows = json::object();
    for (const libsd35::BackendRow& row : libsd35::backends) {
        rows[std::string(row.name)] = {{"title", std::string(row.title)},
                                       {"context_bytes", row.context_bytes},
                                       {"streams", row.streams},
                                       {"keeps_denoiser_room", row.keeps_denoiser_room}};
    }
    return rows;
}

json half(const json& asked) {
    json result = json::array();
    for (const json& one : asked) {
        const std::uint32_t bits = one;
        float value = 0;
        std::memcpy(&value, &bits, sizeof value);
        result.push_back(libsd35::to_half(value));
    }
    return result;
}

}  // namespace

int main(int count, char** arguments) {
    const std::map<std::string, std::function<json(const json&)>> parts{
        {"plan", plan},   {"tokens", tokens}, {"weights", weights},      {"adapters", adapters},
        {"noise", noise}, {"half", half},     {"backends", backend_rows}};
    const auto part = parts.find(count == 2 ? arguments[1] : "");
    if (part == parts.end()) {
        std::cerr << "usage: probe plan|tokens|weights|adapters|noise|half|backends\n";
        return 2;
    }
    try {
        std::cout << part->second(json::parse(std::cin));
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    return 0;
}
