#include "device.hpp"

#include <charconv>

#include "cpu_device.hpp"
#include "error.hpp"
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
    if (gpu_index(name) < 0) {
        throw usage_error("unknown device " + shown(name), "use cpu, cuda or cuda:N");
    }
    throw Error(SD35_FAILED, name + " needs libsd35-cuda.so, which this version does not have",
                "use cpu");
}

}  // namespace libsd35
