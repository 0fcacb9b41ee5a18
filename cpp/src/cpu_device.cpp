#include "cpu_device.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>

#include "error.hpp"

namespace libsd35 {
namespace {

// A "copy" that is the buffer itself.
class Here final : public Fetch {
  public:
    explicit Here(Buffer buffer) : buffer_(std::move(buffer)) {}

    Buffer wait() override { return buffer_; }
    // The reader has read before the next step begins.
    void fence() override {}

  private:
    Buffer buffer_;
};

std::uint64_t resident_bytes() {
    std::ifstream stream("/proc/self/statm");
    std::uint64_t all = 0;
    std::uint64_t resident = 0;
    if (!(stream >> all >> resident)) return 0;
    return resident * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

}  // namespace

Buffer CpuDevice::empty(DType dtype, Shape shape) {
    return host_buffer(dtype, std::move(shape));
}

void CpuDevice::copy(const Buffer& source, const Buffer& target) {
    std::memcpy(target.address(), source.address(), std::min(source.bytes(), target.bytes()));
}

std::vector<Buffer> CpuDevice::slots(const Shape&, std::size_t) {
    return {};
}

std::unique_ptr<Fetch> CpuDevice::fetch(const Buffer& buffer, const Buffer&) {
    return std::make_unique<Here>(buffer);
}

std::unique_ptr<RecordedGraph> CpuDevice::capture(const std::function<void()>&) {
    throw Error(SD35_FAILED, "the CPU records no graphs", "report this");
}

DeviceMemory CpuDevice::memory() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    const std::uint64_t peak = static_cast<std::uint64_t>(usage.ru_maxrss) * 1024;
    const std::uint64_t now = resident_bytes();
    return now == 0 ? DeviceMemory{peak, peak, 0} : DeviceMemory{now, std::max(now, peak), 0};
}

}  // namespace libsd35
