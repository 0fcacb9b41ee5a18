#include "arguments.hpp"

#include "error.hpp"
#include "text.hpp"

namespace libsd35 {

std::int64_t whole(const std::string& name, std::int64_t value, std::int64_t low,
                   std::int64_t high) {
    if (value < low || value > high) {
        throw usage_error(name + " must be " + std::to_string(low) + " to " + std::to_string(high) +
                          ", not " + std::to_string(value));
    }
    return value;
}

double number(const std::string& name, double value, double low, double high) {
    if (!(value >= low && value <= high)) {
        throw usage_error(name + " must be " + general(low) + " to " + general(high) + ", not " +
                          general(value));
    }
    return value;
}

bool is_set(double value) {
    return value != static_cast<double>(SD35_UNSET);
}

bool is_set(std::int64_t value) {
    return value != SD35_UNSET;
}

std::string text_of(const std::string& name, const sd35_text& value, std::uint32_t limit) {
    if (value.data == nullptr && value.length != 0) throw usage_error(name + " is NULL");
    const std::string_view view(value.data == nullptr ? "" : value.data, value.length);
    const auto characters = count_characters(view);
    if (!characters) {
        throw usage_error(name + " is no UTF-8", "replace what is none with U+FFFD");
    }
    if (*characters > limit) {
        throw usage_error(name + " has " + grouped(*characters) + " characters, " + grouped(limit) +
                              " are allowed",
                          "shorten it");
    }
    return std::string(view);
}

std::string entry_name(const std::string& name, std::size_t index, std::size_t count) {
    return count == 1 ? name : name + "[" + std::to_string(index) + "]";
}

}  // namespace libsd35
