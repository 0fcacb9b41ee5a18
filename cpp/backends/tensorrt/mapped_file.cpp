#include "mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

#include "plugin/failure.hpp"

namespace libsd35::trt {

MappedFile::MappedFile(const char* path) {
    const int descriptor = ::open(path, O_RDONLY | O_CLOEXEC);
    struct stat status {};
    bool good = descriptor >= 0 && ::fstat(descriptor, &status) == 0;
    if (good && status.st_size > 0) {  // an empty one cannot be mapped
        size_ = static_cast<std::size_t>(status.st_size);
        data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, descriptor, 0);
        good = data_ != MAP_FAILED;
    }
    const int code = errno;
    if (descriptor >= 0) ::close(descriptor);
    if (!good) {
        throw Failure(SD35_BUNDLE, std::string(path) +
                                       " cannot be read: " + std::generic_category().message(code) +
                                       " — build it again with: sd35-trt build");
    }
}

MappedFile::~MappedFile() {
    if (size_ != 0) ::munmap(data_, size_);
}

}  // namespace libsd35::trt
