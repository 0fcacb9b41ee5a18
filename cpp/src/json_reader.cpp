#include "json_reader.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "text.hpp"

namespace libsd35 {
namespace {

using nlohmann::json;

// Deeper than any document of ours.
constexpr int deepest = 64;

}  // namespace

json parse_json(std::string_view text) {
    const auto check_depth = [](int depth, json::parse_event_t, json&) {
        if (depth > deepest) throw UnreadableJson("it is nested too deeply");
        return true;
    };
    try {
        return json::parse(text.begin(), text.end(), check_depth);
    } catch (const json::exception& error) {
        throw UnreadableJson(error.what());
    }
}

JsonReader JsonReader::field(const std::string& name) const {
    if (!value_->is_object()) throw expected("object");
    const auto found = value_->find(name);
    if (found == value_->end()) throw error("Object missing required field `" + name + "`");
    return JsonReader(*found, place_ + "." + name);
}

std::optional<JsonReader> JsonReader::find(const std::string& name) const {
    if (!value_->is_object()) throw expected("object");
    const auto found = value_->find(name);
    if (found == value_->end()) return std::nullopt;
    return JsonReader(*found, place_ + "." + name);
}

std::vector<JsonReader> JsonReader::items(std::size_t least, std::size_t most) const {
    if (!value_->is_array()) throw expected("array");
    if (value_->size() < least || value_->size() > most) {
        throw error("Expected `array` of length " + (least == most ? "== " + std::to_string(most)
                                                     : value_->size() < least
                                                         ? ">= " + std::to_string(least)
                                                         : "<= " + std::to_string(most)));
    }
    std::vector<JsonReader> readers;
    readers.reserve(value_->size());
    for (const json& item : *value_) {
        readers.emplace_back(item, place_ + "[" + std::to_string(readers.size()) + "]");
    }
    return readers;
}

std::vector<std::pair<std::string, JsonReader>> JsonReader::members(std::size_t most) const {
    if (!value_->is_object()) throw expected("object");
    if (value_->size() > most) {
        throw error("Expected `object` of length <= " + std::to_string(most));
    }
    std::vector<std::pair<std::string, JsonReader>> result;
    result.reserve(value_->size());
    for (auto member = value_->begin(); member != value_->end(); ++member) {
        const std::size_t length = count_characters(member.key()).value_or(0);
        if (length < 1 || length > longest_name) {
            throw error("Expected keys of length 1 to " + std::to_string(longest_name));
        }
        result.emplace_back(member.key(), JsonReader(*member, place_ + "[...]"));
    }
    return result;
}

std::int64_t JsonReader::integer(std::int64_t low, std::int64_t high) const {
    if (!value_->is_number_integer()) throw expected("int");
    const bool large = value_->is_number_unsigned() &&
                       value_->get<std::uint64_t>() >
                           static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    const std::int64_t number = large ? high : value_->get<std::int64_t>();
    if (large || number > high) throw error("Expected `int` <= " + std::to_string(high));
    if (number < low) throw error("Expected `int` >= " + std::to_string(low));
    return number;
}

std::uint64_t JsonReader::count() const {
    return static_cast<std::uint64_t>(integer(0, std::numeric_limits<std::int64_t>::max()));
}

double JsonReader::number() const {
    if (!value_->is_number()) throw expected("float");
    const double number = value_->get<double>();
    if (!std::isfinite(number)) throw error("Number out of range");
    return number;
}

bool JsonReader::boolean() const {
    if (!value_->is_boolean()) throw expected("bool");
    return value_->get<bool>();
}

std::string JsonReader::text(std::size_t least, std::size_t most) const {
    if (!value_->is_string()) throw expected("str");
    const auto& value = value_->get_ref<const std::string&>();
    const std::size_t length = count_characters(value).value_or(0);
    if (length < least) throw error("Expected `str` of length >= " + std::to_string(least));
    if (length > most) throw error("Expected `str` of length <= " + std::to_string(most));
    return value;
}

std::string JsonReader::digest() const {
    std::string value = text(0, longest_text);
    const bool fits = value.size() == 64 && std::all_of(value.begin(), value.end(), [](char c) {
                          return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
                      });
    if (!fits) throw error("Expected `str` of 64 hex digits");
    return value;
}

std::pair<std::int64_t, std::int64_t> JsonReader::pair(std::int64_t low, std::int64_t high) const {
    const auto both = items(2, 2);
    return {both[0].integer(low, high), both[1].integer(low, high)};
}

FieldError JsonReader::error(const std::string& reason) const {
    return FieldError(reason + " - at `" + place_ + "`");
}

FieldError JsonReader::expected(std::string_view kind) const {
    const char* actual = value_->is_null()             ? "null"
                         : value_->is_boolean()        ? "bool"
                         : value_->is_number_integer() ? "int"
                         : value_->is_number()         ? "float"
                         : value_->is_string()         ? "str"
                         : value_->is_array()          ? "array"
                                                       : "object";
    return error("Expected `" + std::string(kind) + "`, got `" + actual + "`");
}

}  // namespace libsd35
