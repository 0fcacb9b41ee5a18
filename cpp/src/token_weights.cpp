#include "token_weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <locale>
#include <optional>
#include <sstream>

#include "error.hpp"
#include "half.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

constexpr double emphasis = 1.1;
constexpr double largest_weight = 100.0;
constexpr int deepest = 100;

// ---- Escapes: a NUL and a character stand for what a part may not begin or end with ----

char stand_in_of(char c) {
    switch (c) {
        case '(':
            return '<';
        case ')':
            return '>';
        default:
            return c;
    }
}

std::string escaped(std::string_view text) {
    std::string result;
    for (std::size_t i = 0; i < text.size(); ++i) {
        const bool mark =
            text[i] == '\\' && i + 1 < text.size() && (text[i + 1] == '(' || text[i + 1] == ')');
        if (mark) ++i;
        if (mark || text[i] == '\0') result += '\0';
        result += mark ? stand_in_of(text[i]) : text[i];
    }
    return result;
}

std::string unescaped(std::string_view text) {
    std::string result;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] != '\0') {
            result += text[i];
        } else if (++i < text.size()) {
            result += text[i] == '<' ? '(' : text[i] == '>' ? ')' : text[i];
        }
    }
    return result;
}

// ---- Numbers ----

bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

std::size_t skip_digits(std::string_view text, std::size_t from) {
    while (from < text.size() && is_digit(text[from])) ++from;
    return from;
}

// Whether an unsigned number has this form: digits with or without a point among or beside them,
// and perhaps an exponent.
bool is_decimal(std::string_view text) {
    const std::size_t point = skip_digits(text, 0);
    std::size_t end = point;
    if (end < text.size() && text[end] == '.') end = skip_digits(text, end + 1);
    if (end == 0 || (point == 0 && end == 1)) return false;
    if (end == text.size()) return true;
    if (text[end] != 'e' && text[end] != 'E') return false;
    ++end;
    if (end < text.size() && (text[end] == '+' || text[end] == '-')) ++end;
    return end < text.size() && skip_digits(text, end) == text.size();
}

std::string_view stripped(std::string_view text) {
    const std::string_view spaces = " \t\n\r\f\v";
    const std::size_t first = text.find_first_not_of(spaces);
    if (first == std::string_view::npos) return {};
    return text.substr(first, text.find_last_not_of(spaces) - first + 1);
}

std::string lower(std::string_view text) {
    std::string result(text);
    for (char& c : result) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    return result;
}

double parse_decimal(const std::string& text) {
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());
    double value = 0;
    // It fails where the value is too large.
    return stream >> value ? value : std::numeric_limits<double>::infinity();
}

std::optional<double> parse_number(std::string_view text) {
    text = stripped(text);
    const bool negative = !text.empty() && text.front() == '-';
    if (negative || (!text.empty() && text.front() == '+')) text.remove_prefix(1);
    const std::string word = lower(text);
    double value = 0;
    if (is_decimal(word)) {
        value = parse_decimal(word);
    } else if (word == "inf" || word == "infinity") {
        value = std::numeric_limits<double>::infinity();
    } else if (word == "nan") {
        return std::numeric_limits<double>::quiet_NaN();
    } else {
        return std::nullopt;
    }
    return negative ? -value : value;
}

// ---- Parts ----

// What is in parentheses, with them, and what is between.
std::vector<std::string_view> pieces_of(std::string_view text) {
    std::vector<std::string_view> pieces;
    std::size_t start = 0;
    std::int64_t depth = 0;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '(') {
            if (depth == 0 && start < i) {
                pieces.push_back(text.substr(start, i - start));
                start = i;
            }
            ++depth;
        } else if (text[i] == ')' && --depth == 0) {
            pieces.push_back(text.substr(start, i + 1 - start));
            start = i + 1;
        }
    }
    if (start < text.size()) pieces.push_back(text.substr(start));
    return pieces;
}

struct Weighted {
    std::string_view text;
    double weight;
};

// What is in a pair of parentheses without its weight, and this.
Weighted weight_of(std::string_view inside, double usual) {
    const std::size_t colon = inside.rfind(':');
    if (colon == std::string_view::npos || colon == 0) return {inside, usual};
    const auto weight = parse_number(inside.substr(colon + 1));
    if (!weight) return {inside, usual};
    if (!(std::fabs(*weight) <= largest_weight)) {  // nor is NaN
        throw usage_error("a part of a prompt has the weight " + general(*weight),
                          "use -" + general(largest_weight) + " to " + general(largest_weight));
    }
    return {inside.substr(0, colon), *weight};
}

void add_parts(std::vector<WeightedPart>& parts, const Weighted& outer, int depth) {
    if (depth > deepest) {
        throw usage_error(
            "a prompt nests parentheses more than " + std::to_string(deepest) + " deep",
            "write fewer");
    }
    for (const std::string_view piece : pieces_of(outer.text)) {
        if (piece.size() < 2 || piece.front() != '(' || piece.back() != ')') {
            parts.push_back({unescaped(piece), outer.weight});
        } else {
            const std::string_view inside = piece.substr(1, piece.size() - 2);
            add_parts(parts, weight_of(inside, outer.weight * emphasis), depth + 1);
        }
    }
}

// ---- Features ----

float value_at(const std::byte* from, DType dtype) {
    std::uint16_t narrow = 0;
    float wide = 0;
    if (dtype == DType::float32) {
        std::memcpy(&wide, from, sizeof wide);
        return wide;
    }
    std::memcpy(&narrow, from, sizeof narrow);
    return from_half(narrow);
}

}  // namespace

std::vector<WeightedPart> weighted_parts(std::string_view text) {
    const std::string marked = escaped(text);
    std::vector<WeightedPart> parts;
    add_parts(parts, {marked, 1.0}, 0);
    return parts;
}

void weigh(const Buffer& hidden, const Buffer& empty, const Place& place,
           const std::vector<float>& weights) {
    const DType dtype = hidden.dtype();
    const std::size_t item = item_bytes(dtype);
    for (std::size_t row = 0; row < weights.size(); ++row) {
        if (weights[row] == 1.0F) continue;
        const std::int64_t own = place.first_row + static_cast<std::int64_t>(row);
        const std::size_t first = static_cast<std::size_t>(place.column) * item;
        std::byte* z = hidden.row(own).address() + first;
        const std::byte* z_empty = empty.row(own).address() + first;
        for (std::int64_t i = 0; i < place.width; ++i, z += item, z_empty += item) {
            const float base = value_at(z_empty, dtype);
            const float weighted = (value_at(z, dtype) - base) * weights[row] + base;
            convert(reinterpret_cast<const std::byte*>(&weighted), DType::float32, z, dtype, 1);
        }
    }
}

}  // namespace libsd35
