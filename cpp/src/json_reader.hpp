// Typed reading of JSON that may be anybody's: bounded, and refused by the name of the field.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace libsd35 {

// Names of components, ports, dimensions, layers, and files of a checkpoint.
constexpr std::size_t longest_name = 1024;
// What people wrote or read: commands, reasons, versions.
constexpr std::size_t longest_text = std::size_t{1} << 16;

// JSON that is not what it has to be; the message has the field as $.components[0].name.
class FieldError : public std::exception {
  public:
    explicit FieldError(std::string reason) : reason_(std::move(reason)) {}
    const char* what() const noexcept override { return reason_.c_str(); }

  private:
    std::string reason_;
};

// Text that is no JSON, or nested too deeply.
class UnreadableJson : public std::exception {
  public:
    explicit UnreadableJson(std::string reason) : reason_(std::move(reason)) {}
    const char* what() const noexcept override { return reason_.c_str(); }

  private:
    std::string reason_;
};

// A value from JSON. Throws UnreadableJson.
nlohmann::json parse_json(std::string_view text);

// A value and where it stands. All throw FieldError.
class JsonReader {
  public:
    explicit JsonReader(const nlohmann::json& value, std::string place = "$")
        : value_(&value), place_(std::move(place)) {}

    // A field of an object, and one that may be absent.
    JsonReader field(const std::string& name) const;
    std::optional<JsonReader> find(const std::string& name) const;

    std::vector<JsonReader> items(std::size_t least, std::size_t most) const;
    // By name, which is 1 to `longest_name` characters; of at most so many.
    std::vector<std::pair<std::string, JsonReader>> members(std::size_t most = SIZE_MAX) const;

    std::int64_t integer(std::int64_t low, std::int64_t high) const;
    std::uint64_t count() const;
    double number() const;
    bool boolean() const;
    std::string text(std::size_t least, std::size_t most) const;
    std::string name() const { return text(1, longest_name); }
    std::string any_text() const { return text(0, longest_text); }
    // 64 hex digits.
    std::string digest() const;
    bool is_text() const { return value_->is_string(); }
    bool is_null() const { return value_->is_null(); }
    bool is_list() const { return value_->is_array(); }
    // Text, number, boolean or null.
    bool is_scalar() const { return value_->is_primitive(); }

    // Two integers in these bounds.
    std::pair<std::int64_t, std::int64_t> pair(std::int64_t low, std::int64_t high) const;

    FieldError error(const std::string& reason) const;

  private:
    FieldError expected(std::string_view kind) const;

    const nlohmann::json* value_;
    std::string place_;
};

}  // namespace libsd35
