// Memory of the host or of a device, with a type and a shape.
#pragma once

#include <cstddef>
#include <memory>

#include "dtype.hpp"

namespace libsd35 {

// C-contiguous. Rows of the first axis, and another shape of as many elements, share the memory,
// which is freed with the last of them.
class Buffer {
  public:
    Buffer() = default;
    Buffer(std::shared_ptr<void> owner, std::byte* address, DType dtype, Shape shape);

    std::byte* address() const noexcept { return address_; }
    DType dtype() const noexcept { return dtype_; }
    const Shape& shape() const noexcept { return shape_; }
    std::size_t bytes() const noexcept { return bytes_; }
    explicit operator bool() const noexcept { return address_ != nullptr; }

    // Row i of the first axis, of one axis less; `count` rows from `first` on. Throws Error where
    // it has no such rows.
    Buffer row(std::int64_t i) const;
    Buffer rows(std::int64_t first, std::int64_t count) const;
    Buffer reshape(Shape shape) const;

    // The elements, of a buffer on the host.
    template <typename T>
    T* data() const noexcept {
        return reinterpret_cast<T*>(address_);
    }

  private:
    Buffer part(std::int64_t first, std::int64_t count, Shape shape) const;

    std::shared_ptr<void> owner_;
    std::byte* address_ = nullptr;
    DType dtype_ = DType::uint8;
    Shape shape_;
    std::size_t bytes_ = 0;
};

// New memory of the host with any content. Throws Error.
Buffer host_buffer(DType dtype, Shape shape);

// The same filled with zeros.
Buffer host_zeros(DType dtype, Shape shape);

// A copy on the host.
Buffer host_copy(const Buffer& source);

}  // namespace libsd35
