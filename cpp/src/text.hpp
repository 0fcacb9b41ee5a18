// Text: UTF-8, and values in messages. Nothing here depends on the locale.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace libsd35 {

// Characters of UTF-8; nothing where it is none.
std::optional<std::size_t> count_characters(std::string_view text);

// With all white space as single spaces.
std::string one_line(std::string_view text);

// As printf's %g with so many digits.
std::string general(double value, int digits = 6);

// As printf's %f with so many decimals.
std::string fixed(double value, int decimals);

// With commas between thousands.
std::string grouped(std::uint64_t value);

// Decimal units, three digits: 23.6 MB.
std::string format_bytes(double count);

// Binary units where they come out whole, as memory is sold: 8 GiB; else decimal.
std::string format_memory(std::uint64_t count);

std::string join(const std::vector<std::string>& words, std::string_view between = ", ");

// In quotes, short, with what is not printable ASCII escaped: for messages.
std::string shown(std::string_view text, std::size_t longest = 60);

// Lower-case hex digits.
std::string hex(const std::uint8_t* data, std::size_t size);

// Numbers of a version: {1, 24, 2} of "1.24.2".
std::vector<int> version_numbers(std::string_view version);

}  // namespace libsd35
