// A GPU as a device, through a plug-in.
#pragma once

#include "device.hpp"

namespace libsd35 {

// `index` is the GPU's number. Throws Error: no plug-in, no driver, or no such GPU.
std::unique_ptr<Device> open_gpu(int index);

}  // namespace libsd35
