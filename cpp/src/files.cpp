#include "files.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "sha256.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

FileError failure(int code) {
    return FileError(std::generic_category().message(code), code == ENOENT || code == ENOTDIR);
}

}  // namespace

// A pipe would make the open wait for its other end.
RegularFile::RegularFile(const std::filesystem::path& path)
    : descriptor_(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {
    if (descriptor_ < 0) throw failure(errno);
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0) {
        const int code = errno;
        ::close(descriptor_);
        throw failure(code);
    }
    if (!S_ISREG(status.st_mode)) {
        ::close(descriptor_);
        throw FileError("it is no regular file", false);
    }
    size_ = static_cast<std::uint64_t>(status.st_size);
}

RegularFile::~RegularFile() {
    ::close(descriptor_);
}

std::size_t RegularFile::read(char* into, std::size_t capacity) {
    for (;;) {
        const ssize_t count = ::read(descriptor_, into, capacity);
        if (count >= 0) return static_cast<std::size_t>(count);
        if (errno != EINTR) throw failure(errno);
    }
}

std::string read_file(const std::filesystem::path& path, std::uint64_t limit) {
    RegularFile file(path);
    if (file.size() > limit) {
        throw FileError(
            "it has " + grouped(file.size()) + " bytes, at most " + grouped(limit) + " are read",
            false);
    }
    // It may have become another while it is read.
    std::string data(static_cast<std::size_t>(file.size()), '\0');
    std::size_t filled = 0;
    while (filled < data.size()) {
        const std::size_t count = file.read(data.data() + filled, data.size() - filled);
        if (count == 0) break;
        filled += count;
    }
    data.resize(filled);
    return data;
}

std::string sha256_of(RegularFile& file) {
    Sha256 digest;
    std::vector<char> block(std::size_t{1} << 20);
    while (const std::size_t count = file.read(block.data(), block.size())) {
        digest.update({block.data(), count});
    }
    return digest.digest();
}

}  // namespace libsd35
