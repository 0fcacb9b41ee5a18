#include "dtype.hpp"

#include <array>
#include <limits>

#include "error.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

struct Row {
    std::string_view name;
    std::size_t bytes;
};

// In the order of DType.
constexpr std::array<Row, 8> rows{{
    {"bool", 1},
    {"uint8", 1},
    {"int8", 1},
    {"int32", 4},
    {"int64", 8},
    {"float16", 2},
    {"float32", 4},
    {"float64", 8},
}};

const Row& row(DType dtype) {
    return rows[static_cast<std::size_t>(dtype)];
}

std::size_t product(const Shape& shape, std::size_t first) {
    std::size_t count = first;
    for (const std::int64_t side : shape) {
        if (side < 0 || __builtin_mul_overflow(count, static_cast<std::size_t>(side), &count) ||
            count > static_cast<std::size_t>(std::numeric_limits<std::int64_t>::max())) {
            throw Error(SD35_OUT_OF_MEMORY,
                        "a tensor of shape " + to_text(shape) + " is larger than any memory",
                        "check the bundle: sd35-trt verify BUNDLE");
        }
    }
    return count;
}

}  // namespace

std::optional<DType> dtype_of(std::string_view name) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].name == name) return static_cast<DType>(i);
    }
    return std::nullopt;
}

std::string_view name_of(DType dtype) {
    return row(dtype).name;
}

std::size_t item_bytes(DType dtype) {
    return row(dtype).bytes;
}

std::size_t element_count(const Shape& shape) {
    return product(shape, 1);
}

std::size_t byte_count(const Shape& shape, DType dtype) {
    return product(shape, item_bytes(dtype));
}

std::string to_text(const Shape& shape) {
    std::vector<std::string> sides;
    for (const std::int64_t side : shape) sides.push_back(std::to_string(side));
    return "[" + join(sides) + "]";
}

}  // namespace libsd35
