// Types of values and shapes of tensors.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace libsd35 {

// The numbers are part of the interface to backends.
enum class DType : std::int32_t {
    boolean = 0,
    uint8 = 1,
    int8 = 2,
    int32 = 3,
    int64 = 4,
    float16 = 5,
    float32 = 6,
    float64 = 7,
};

using Shape = std::vector<std::int64_t>;

// By numpy's name.
std::optional<DType> dtype_of(std::string_view name);
std::string_view name_of(DType dtype);
std::size_t item_bytes(DType dtype);

// Throws Error where no memory is as large.
std::size_t element_count(const Shape& shape);
std::size_t byte_count(const Shape& shape, DType dtype);

// [2, 16, 8, 8]
std::string to_text(const Shape& shape);

}  // namespace libsd35
