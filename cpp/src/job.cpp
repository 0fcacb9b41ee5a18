#include "job.hpp"

namespace libsd35 {

void Job::after_step(const Step& step) {
    if (callback == nullptr) return;
    sd35_step seen{};
    seen.size = sizeof seen;
    seen.index = static_cast<std::uint32_t>(step.index);
    seen.total = static_cast<std::uint32_t>(step.total);
    seen.sigma = step.sigma;
    seen.latents = step.latents.data<float>();
    for (std::size_t i = 0; i < 4; ++i) {
        seen.shape[i] = static_cast<std::uint64_t>(step.latents.shape()[i]);
    }
    if (callback(&seen, callback_user) != 0) {
        outcome = Error(SD35_CANCELLED, "cancelled after step " + std::to_string(step.index + 1) +
                                            " of " + std::to_string(step.total));
    }
}

}  // namespace libsd35
