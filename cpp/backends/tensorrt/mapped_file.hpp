// A file in memory: its pages are read as they are used.
#pragma once

#include <cstddef>

namespace libsd35::trt {

class MappedFile {
  public:
    // Throws Failure where it cannot be read.
    explicit MappedFile(const char* path);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    const void* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }

  private:
    void* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace libsd35::trt
