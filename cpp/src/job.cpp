#include "job.hpp"

// Where sd35_step_denoised has it from.
struct sd35_step_source {
    const libsd35::Step* step;
    libsd35::Buffer denoised;  // once it was asked for
};

namespace libsd35 {

Step Step::part(const Part& images) const {
    const auto rows = [images](const Buffer& buffer) {
        return buffer.rows(static_cast<std::int64_t>(images.first),
                           static_cast<std::int64_t>(images.count));
    };
    return {index, total, sigma, rows(latents), [rows, fetch = denoised] { return rows(fetch()); }};
}

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
    sd35_step_source source{&step, {}};
    seen.source = &source;
    if (callback(&seen, callback_user) != 0) {
        outcome = Error(SD35_CANCELLED, "cancelled after step " + std::to_string(step.index + 1) +
                                            " of " + std::to_string(step.total));
    }
}

const float* denoised_of(sd35_step_source* source) {
    if (!source->denoised) source->denoised = source->step->denoised();
    return source->denoised.data<float>();
}

}  // namespace libsd35
