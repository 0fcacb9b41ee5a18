#include "text.hpp"

#include <array>
#include <charconv>
#include <cmath>

namespace libsd35 {
namespace {

bool is_space(char c) {
    return c == ' ' || (c >= '\t' && c <= '\r');
}

// Bytes of the character that begins with this one; 0 where none does.
std::size_t sequence_length(std::uint8_t lead) {
    if (lead < 0x80) return 1;
    if (lead >= 0xC2 && lead <= 0xDF) return 2;
    if (lead >= 0xE0 && lead <= 0xEF) return 3;
    if (lead >= 0xF0 && lead <= 0xF4) return 4;
    return 0;
}

// Whether the byte after the first rules out overlong forms, surrogates and what is past the last
// plane.
bool second_fits(std::uint8_t lead, std::uint8_t second) {
    switch (lead) {
        case 0xE0:
            return second >= 0xA0;
        case 0xED:
            return second <= 0x9F;
        case 0xF0:
            return second >= 0x90;
        case 0xF4:
            return second <= 0x8F;
        default:
            return true;
    }
}

std::string number(double value, std::chars_format format, int precision) {
    std::array<char, 400> buffer;
    const auto end =
        std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, format, precision);
    return std::string(buffer.data(), end.ptr);
}

}  // namespace

std::optional<std::size_t> count_characters(std::string_view text) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < text.size(); ++count) {
        const auto lead = static_cast<std::uint8_t>(text[i]);
        const std::size_t length = sequence_length(lead);
        if (length == 0 || length > text.size() - i) return std::nullopt;
        for (std::size_t k = 1; k < length; ++k) {
            const auto next = static_cast<std::uint8_t>(text[i + k]);
            if ((next & 0xC0) != 0x80 || (k == 1 && !second_fits(lead, next))) return std::nullopt;
        }
        i += length;
    }
    return count;
}

std::string one_line(std::string_view text) {
    std::string line;
    line.reserve(text.size());
    bool pending = false;
    for (const char c : text) {
        if (is_space(c)) {
            pending = !line.empty();
            continue;
        }
        if (pending) line += ' ';
        pending = false;
        line += c;
    }
    return line;
}

std::string general(double value, int digits) {
    return number(value, std::chars_format::general, digits);
}

std::string fixed(double value, int decimals) {
    return number(value, std::chars_format::fixed, decimals);
}

std::string grouped(std::uint64_t value) {
    std::string digits = std::to_string(value);
    for (std::size_t i = digits.size(); i > 3;) digits.insert(i -= 3, ",");
    return digits;
}

std::string format_bytes(double count) {
    if (count < 1000) return fixed(count, 0) + " B";
    for (const char* unit : {"kB", "MB"}) {
        count /= 1000;
        if (count < 1000) return fixed(count, 1) + " " + unit;
    }
    return fixed(count / 1000, 1) + " GB";
}

std::string format_memory(std::uint64_t count) {
    constexpr std::uint64_t gib = std::uint64_t{1} << 30;
    if (count != 0 && count % gib == 0) return std::to_string(count / gib) + " GiB";
    return format_bytes(static_cast<double>(count));
}

std::string join(const std::vector<std::string>& words, std::string_view between) {
    std::string text;
    for (const std::string& word : words) {
        if (!text.empty()) text += between;
        text += word;
    }
    return text;
}

std::string shown(std::string_view text, std::size_t longest) {
    std::string result = "'";
    for (const char c : text.substr(0, longest)) {
        const auto byte = static_cast<std::uint8_t>(c);
        if (byte >= 0x20 && byte < 0x7F) {
            result += c;
        } else {
            result += "\\x" + hex(&byte, 1);
        }
    }
    return result + (text.size() > longest ? "..." : "") + "'";
}

std::string hex(const std::uint8_t* data, std::size_t size) {
    constexpr std::string_view digits = "0123456789abcdef";
    std::string text;
    text.reserve(2 * size);
    for (std::size_t i = 0; i < size; ++i) {
        text += digits[data[i] >> 4];
        text += digits[data[i] & 15];
    }
    return text;
}

std::vector<int> version_numbers(std::string_view version) {
    std::vector<int> numbers;
    const char* at = version.data();
    const char* const end = at + version.size();
    while (at != end) {
        int value = 0;
        const auto [next, failure] = std::from_chars(at, end, value);
        if (failure == std::errc() && *at != '-') {
            numbers.push_back(value);
            at = next;
        } else {
            ++at;
        }
    }
    return numbers;
}

}  // namespace libsd35
