// Host memory that a loop's latents are copied to.
#pragma once

#include <list>
#include <utility>
#include <vector>

#include "device.hpp"

namespace libsd35 {

// What one run has at most, and all together.
inline constexpr std::size_t slot_bytes = 256 << 20;

// Pinned arrays by shape, used again by the next run: to pin memory takes longer than a step, and
// waits for the device. Those of the latest shapes are kept, up to `slot_bytes`.
class HostSlots {
  public:
    explicit HostSlots(Device& device) : device_(device) {}

    // Float32 arrays, as many as asked for; none where the device does not copy. They are
    // overwritten when the same shape is asked for again.
    std::vector<Buffer> take(const Shape& shape, std::size_t count);

  private:
    std::size_t bytes() const;

    Device& device_;
    std::list<std::pair<Shape, std::vector<Buffer>>> slots_;
};

}  // namespace libsd35
