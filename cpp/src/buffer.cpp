#include "buffer.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "error.hpp"

namespace libsd35 {
namespace {

// Of a cache line, and of the widest vectors.
constexpr std::size_t alignment = 64;

}  // namespace

Buffer::Buffer(std::shared_ptr<void> owner, std::byte* address, DType dtype, Shape shape)
    : owner_(std::move(owner)),
      address_(address),
      dtype_(dtype),
      shape_(std::move(shape)),
      bytes_(byte_count(shape_, dtype_)) {}

Buffer Buffer::row(std::int64_t i) const {
    return part(i, 1, Shape(shape_.begin() + 1, shape_.end()));
}

Buffer Buffer::rows(std::int64_t first, std::int64_t count) const {
    Shape shape = shape_;
    shape.at(0) = count;
    return part(first, count, std::move(shape));
}

Buffer Buffer::part(std::int64_t first, std::int64_t count, Shape shape) const {
    if (first < 0 || count < 0 || first + count > shape_.at(0)) {
        // What an engine gives has another shape than what was asked of it.
        throw bundle_error("a tensor of shape " + to_text(shape_) + " has no rows " +
                               std::to_string(first) + " to " + std::to_string(first + count - 1),
                           "build the bundle again");
    }
    const std::size_t row_bytes =
        bytes_ / static_cast<std::size_t>(std::max<std::int64_t>(shape_.front(), 1));
    return Buffer(owner_, address_ + row_bytes * static_cast<std::size_t>(first), dtype_,
                  std::move(shape));
}

Buffer Buffer::reshape(Shape shape) const {
    Buffer result(owner_, address_, dtype_, std::move(shape));
    if (result.bytes_ != bytes_) {
        throw std::invalid_argument("a buffer of shape " + to_text(shape_) + " cannot have " +
                                    to_text(result.shape_));
    }
    return result;
}

Buffer host_buffer(DType dtype, Shape shape) {
    const std::size_t bytes = byte_count(shape, dtype);
    const std::size_t rounded =
        (std::max<std::size_t>(bytes, 1) + alignment - 1) / alignment * alignment;
    std::shared_ptr<void> owner(std::aligned_alloc(alignment, rounded), std::free);
    if (owner == nullptr) throw std::bad_alloc();
    auto* const address = static_cast<std::byte*>(owner.get());
    return Buffer(std::move(owner), address, dtype, std::move(shape));
}

Buffer host_zeros(DType dtype, Shape shape) {
    Buffer buffer = host_buffer(dtype, std::move(shape));
    std::memset(buffer.address(), 0, buffer.bytes());
    return buffer;
}

Buffer host_copy(const Buffer& source) {
    Buffer copy = host_buffer(source.dtype(), source.shape());
    std::memcpy(copy.address(), source.address(), source.bytes());
    return copy;
}

}  // namespace libsd35
