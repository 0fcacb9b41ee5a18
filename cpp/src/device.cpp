#include "device.hpp"

#include <charconv>

#include "cpu_device.hpp"
#include "error.hpp"
#include "gpu_device.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

// N of cuda:N, 0 of cuda; -1 where the name is another.
int gpu_index(const std::string& name) {
    if (name == "cuda") return 0;
    constexpr std::string_view prefix = "cuda:";
    if (name.rfind(prefix, 0) != 0 || name.size() == prefix.size()) return -1;
    int index = -1;
    const char* const end = name.data() + name.size();
    const auto read = std::from_chars(name.data() + prefix.size(), end, index);
    return read.ec == std::errc() && read.ptr == end ? index : -1;
}

}  // namespace

std::unique_ptr<Device> open_device(const std::string& name) {
    if (name == "cpu") return std::make_unique<CpuDevice>();
    const int index = gpu_index(name);
    if (index < 0) {
        throw usage_error("unknown device " + shown(name), "use cpu, cuda or cuda:N");
    }
    return open_gpu(index);
}

}  // namespace libsd35
