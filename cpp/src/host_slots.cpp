#include "host_slots.hpp"

#include <algorithm>

namespace libsd35 {

std::vector<Buffer> HostSlots::take(const Shape& shape, std::size_t count) {
    const auto known = std::find_if(slots_.begin(), slots_.end(),
                                    [&](const auto& entry) { return entry.first == shape; });
    if (known == slots_.end()) {
        slots_.emplace_back(shape, std::vector<Buffer>());
    } else {
        slots_.splice(slots_.end(), slots_, known);
    }
    std::vector<Buffer>& own = slots_.back().second;
    if (count > own.size()) {
        for (Buffer& slot : device_.slots(shape, count - own.size())) {
            own.push_back(std::move(slot));
        }
    }
    while (slots_.size() > 1 && bytes() > slot_bytes) slots_.pop_front();
    const auto taken = static_cast<std::ptrdiff_t>(std::min(count, own.size()));
    return {own.begin(), own.begin() + taken};
}

std::size_t HostSlots::bytes() const {
    std::size_t all = 0;
    for (const auto& [_, slots] : slots_) {
        for (const Buffer& slot : slots) all += slot.bytes();
    }
    return all;
}

}  // namespace libsd35
