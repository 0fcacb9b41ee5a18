// Reading files that may be anybody's: regular ones alone, of a bounded size.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <system_error>

namespace libsd35 {

// Why a file cannot be read.
class FileError : public std::exception {
  public:
    // `missing`: nothing is there, or no regular file.
    FileError(std::string reason, bool missing) : reason_(std::move(reason)), missing_(missing) {}

    bool missing() const noexcept { return missing_; }
    const char* what() const noexcept override { return reason_.c_str(); }

  private:
    std::string reason_;
    bool missing_;
};

// An open regular file.
class RegularFile {
  public:
    // Throws FileError.
    explicit RegularFile(const std::filesystem::path& path);
    ~RegularFile();
    RegularFile(const RegularFile&) = delete;
    RegularFile& operator=(const RegularFile&) = delete;

    std::uint64_t size() const noexcept { return size_; }
    // At most `capacity` bytes, 0 at the end. Throws FileError.
    std::size_t read(char* into, std::size_t capacity);

  private:
    int descriptor_;
    std::uint64_t size_ = 0;
};

// A file's content; one of more than `limit` bytes is refused before it is read. Throws FileError.
std::string read_file(const std::filesystem::path& path, std::uint64_t limit);

// SHA-256 of what is left of a file, in hex. Throws FileError.
std::string sha256_of(RegularFile& file);

}  // namespace libsd35
