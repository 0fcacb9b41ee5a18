// Checks of a request's arguments: each is of one kind, and what is not is refused by its name.
#pragma once

#include <sd35/sd35.h>

#include <cstdint>
#include <string>
#include <vector>

namespace libsd35 {

// A number from `low` to `high`; NaN is between no two. Throw Error.
std::int64_t whole(const std::string& name, std::int64_t value, std::int64_t low,
                   std::int64_t high);
double number(const std::string& name, double value, double low, double high);

// Whether a number is not left to the bundle.
bool is_set(double value);
bool is_set(std::int64_t value);

// Text in UTF-8 of at most `limit` characters. Throws Error.
std::string text_of(const std::string& name, const sd35_text& value, std::uint32_t limit);

// An entry of a list, or the only one.
std::string entry_name(const std::string& name, std::size_t index, std::size_t count);

}  // namespace libsd35
