#include "python_json.hpp"

#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

namespace libsd35 {
namespace {

using nlohmann::json;

// As repr: the shortest digits that read back the same, with an exponent below 1e-4 and from 1e16.
std::string repr(double value) {
    const double magnitude = std::fabs(value);
    const bool plain = magnitude == 0 || (magnitude >= 1e-4 && magnitude < 1e16);
    std::array<char, 64> buffer;
    const auto end =
        std::to_chars(buffer.data(), buffer.data() + buffer.size(), value,
                      plain ? std::chars_format::fixed : std::chars_format::scientific);
    std::string text(buffer.data(), end.ptr);
    return plain && text.find('.') == std::string::npos ? text + ".0" : text;
}

void write(const json& value, std::string& out);

void write_object(const json& value, std::string& out) {
    out += '{';
    const char* between = "";
    // In the order of their bytes, which is that of their code points.
    for (auto member = value.begin(); member != value.end(); ++member, between = ", ") {
        out += between;
        write(member.key(), out);
        out += ": ";
        write(*member, out);
    }
    out += '}';
}

void write_array(const json& value, std::string& out) {
    out += '[';
    const char* between = "";
    for (const json& item : value) {
        out += between;
        write(item, out);
        between = ", ";
    }
    out += ']';
}

void write(const json& value, std::string& out) {
    if (value.is_object()) {
        write_object(value, out);
    } else if (value.is_array()) {
        write_array(value, out);
    } else if (value.is_number_float()) {
        out += repr(value.get<double>());
    } else if (value.is_string()) {
        // With all but printable ASCII escaped.
        out += value.dump(-1, ' ', true);
    } else {
        out += value.dump();
    }
}

}  // namespace

std::string python_json(const json& value) {
    std::string out;
    write(value, out);
    return out;
}

}  // namespace libsd35
