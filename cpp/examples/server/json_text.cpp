#include "json_text.hpp"

#include <cstdint>
#include <optional>

namespace server {
namespace {

constexpr std::size_t escape_length = 6;  // \uD83C

std::optional<std::uint32_t> digit(char c) {
    if (c >= '0' && c <= '9') return static_cast<std::uint32_t>(c - '0');
    if (c >= 'a' && c <= 'f') return static_cast<std::uint32_t>(c - 'a' + 10);
    if (c >= 'A' && c <= 'F') return static_cast<std::uint32_t>(c - 'A' + 10);
    return std::nullopt;
}

// The code unit that an escape at this place stands for.
std::optional<std::uint32_t> code_unit(std::string_view json, std::size_t at) {
    if (json.size() - at < escape_length || json[at] != '\\' || json[at + 1] != 'u') {
        return std::nullopt;
    }
    std::uint32_t unit = 0;
    for (std::size_t i = 2; i < escape_length; ++i) {
        const auto value = digit(json[at + i]);
        if (!value) return std::nullopt;
        unit = unit << 4 | *value;
    }
    return unit;
}

bool is_high(std::uint32_t unit) {
    return unit >= 0xD800 && unit <= 0xDBFF;
}

bool is_low(std::uint32_t unit) {
    return unit >= 0xDC00 && unit <= 0xDFFF;
}

}  // namespace

std::string without_lone_surrogates(std::string_view json) {
    std::string text;
    text.reserve(json.size());
    std::size_t at = 0;
    const auto copy = [&](std::size_t length) {
        text += json.substr(at, length);
        at += length;
    };
    while (at < json.size()) {
        const auto unit = code_unit(json, at);
        if (!unit) {
            // A backslash takes the next character with it: \\ud800 is no escape of ours.
            copy(json[at] == '\\' ? 2 : 1);
            continue;
        }
        const auto next = is_high(*unit) && at + escape_length < json.size()
                              ? code_unit(json, at + escape_length)
                              : std::nullopt;
        if (next && is_low(*next)) {
            copy(2 * escape_length);
        } else if (is_high(*unit) || is_low(*unit)) {
            text += "\\ufffd";
            at += escape_length;
        } else {
            copy(escape_length);
        }
    }
    return text;
}

}  // namespace server
