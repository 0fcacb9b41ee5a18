#include "images_api.hpp"

#include <charconv>
#include <ctime>
#include <limits>
#include <set>

#include "json_text.hpp"
#include "png.hpp"

namespace server {
namespace {

using nlohmann::json;

// As nested as no request is.
constexpr int deepest = 16;

json parse(std::string_view body) {
    const auto check_depth = [](int depth, json::parse_event_t, json&) {
        if (depth > deepest) throw BadRequest("the body is nested too deeply");
        return true;
    };
    try {
        return json::parse(without_lone_surrogates(body), check_depth);
    } catch (const json::exception& error) {
        throw BadRequest(std::string("the body is no JSON: ") + error.what());
    }
}

std::string text(const json& fields, const char* name) {
    const json& value = fields.at(name);
    if (!value.is_string()) throw BadRequest(std::string(name) + " must be text");
    return value.get<std::string>();
}

double number(const json& fields, const char* name) {
    const json& value = fields.at(name);
    if (!value.is_number()) throw BadRequest(std::string(name) + " must be a number");
    return value.get<double>();
}

std::int64_t whole(const json& fields, const char* name) {
    const json& value = fields.at(name);
    const bool fits = value.is_number_integer() &&
                      (!value.is_number_unsigned() ||
                       value.get<std::uint64_t>() <=
                           static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()));
    if (!fits) throw BadRequest(std::string(name) + " must be a whole number");
    return value.get<std::int64_t>();
}

std::uint64_t seed(const json& fields) {
    const json& value = fields.at("seed");
    if (!value.is_number_unsigned()) throw BadRequest("seed must be a whole number from 0");
    return value.get<std::uint64_t>();
}

// Width and height of "1024x1024".
std::pair<std::int64_t, std::int64_t> size(const std::string& value) {
    const char* const end = value.data() + value.size();
    std::int64_t width = 0;
    std::int64_t height = 0;
    const auto first = std::from_chars(value.data(), end, width);
    if (first.ec == std::errc() && first.ptr != end && *first.ptr == 'x') {
        const auto second = std::from_chars(first.ptr + 1, end, height);
        if (second.ec == std::errc() && second.ptr == end) return {width, height};
    }
    throw BadRequest("size must be such as 1024x1024, or auto");
}

void check_fields(const json& fields) {
    static const std::set<std::string> known{
        "prompt", "n",        "size",    "response_format", "negative_prompt", "seed", "steps",
        "shift",  "guidance", "sampler", "t5_tokens",       "model",           "user"};
    if (!fields.is_object()) throw BadRequest("the body must be an object");
    for (auto field = fields.begin(); field != fields.end(); ++field) {
        if (known.count(field.key()) == 0) {
            throw BadRequest("the field " + json(field.key()).dump() + " is not known");
        }
    }
    if (!fields.contains("prompt")) throw BadRequest("prompt is missing");
    if (fields.contains("response_format") && text(fields, "response_format") != "b64_json") {
        throw BadRequest("response_format must be b64_json");
    }
}

}  // namespace

sd35::Request read_request(std::string_view body) {
    const json fields = parse(body);
    check_fields(fields);
    sd35::Request request(text(fields, "prompt"));
    if (fields.contains("n")) request.batch = whole(fields, "n");
    if (fields.contains("size") && text(fields, "size") != "auto") {
        request.size = size(text(fields, "size"));
    }
    if (fields.contains("negative_prompt")) request.negatives = {text(fields, "negative_prompt")};
    if (fields.contains("seed")) request.seed = seed(fields);
    if (fields.contains("steps")) request.steps = whole(fields, "steps");
    if (fields.contains("shift")) request.shift = number(fields, "shift");
    if (fields.contains("guidance")) request.guidance = number(fields, "guidance");
    if (fields.contains("sampler")) request.sampler = text(fields, "sampler");
    if (fields.contains("t5_tokens")) request.t5_tokens = whole(fields, "t5_tokens");
    return request;
}

json response_of(const sd35::Result& result) {
    json data = json::array();
    for (std::size_t i = 0; i < result.count(); ++i) {
        const std::string png = png_of(result.image(i).data(), result.width(), result.height());
        data.push_back({{"b64_json", base64(png)}, {"seed", result.seed(i)}});
    }
    return {{"created", static_cast<std::int64_t>(std::time(nullptr))},
            {"data", data},
            {"output_format", "png"},
            {"notes", result.notes()}};
}

json error_of(std::string_view message, std::string_view type, int status) {
    return {{"error", {{"message", message}, {"type", type}, {"code", status}}}};
}

}  // namespace server
