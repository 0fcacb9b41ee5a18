#include "schedule.hpp"

#include <algorithm>
#include <cmath>

namespace libsd35 {
namespace {

using Row = std::array<double, 3>;

double shifted(double x, double shift) {
    return shift * x / (1.0 + (shift - 1.0) * x);
}

std::vector<Row> euler(const std::vector<float>& sigmas) {
    std::vector<Row> table;
    for (std::size_t i = 0; i + 1 < sigmas.size(); ++i) {
        const double ratio = double{sigmas[i + 1]} / double{sigmas[i]};
        table.push_back({ratio, 1.0 - ratio, 0.0});
    }
    return table;
}

double log_snr(float sigma) {
    const double wide{sigma};
    return std::log((1.0 - wide) / wide);
}

// First order in the first two steps, where the second does not exist, and in the last two, across
// which the log-SNR jumps.
std::vector<Row> dpmpp_2m(const std::vector<float>& sigmas) {
    std::vector<Row> table = euler(sigmas);
    for (std::size_t i = 1; i + 2 < table.size(); ++i) {
        const double before = log_snr(sigmas[i - 1]);
        const double now = log_snr(sigmas[i]);
        const double after = log_snr(sigmas[i + 1]);
        if (!std::isfinite(before) || !std::isfinite(now) || !std::isfinite(after)) continue;
        const double weight = (after - now) / (2.0 * (now - before));
        const double b = table[i][1];
        table[i] = {table[i][0], b * (1.0 + weight), -b * weight};
    }
    return table;
}

}  // namespace

std::vector<float> make_sigmas(std::int64_t steps, double shift, double train_timesteps) {
    const double last = shifted(1.0 / train_timesteps, shift);
    std::vector<float> sigmas;
    for (std::int64_t i = 0; i < steps; ++i) {
        double even = 1.0;
        if (steps > 1) {
            const double between = (last - 1.0) / static_cast<double>(steps - 1);
            even = i == steps - 1 ? last : 1.0 + static_cast<double>(i) * between;
        }
        sigmas.push_back(static_cast<float>(shifted(even, shift)));
    }
    sigmas.push_back(0.0F);
    return sigmas;
}

std::vector<float> make_timesteps(const std::vector<float>& sigmas, double train_timesteps) {
    std::vector<float> timesteps;
    for (const float sigma : sigmas) {
        timesteps.push_back(sigma * static_cast<float>(train_timesteps));
    }
    return timesteps;
}

bool is_sampler(std::string_view name) {
    return std::find(samplers.begin(), samplers.end(), name) != samplers.end();
}

std::vector<Coefficients> coefficients(std::string_view sampler, const std::vector<float>& sigmas) {
    std::vector<Coefficients> rounded;
    for (const Row& row : sampler == "dpmpp-2m" ? dpmpp_2m(sigmas) : euler(sigmas)) {
        rounded.push_back(
            {static_cast<float>(row[0]), static_cast<float>(row[1]), static_cast<float>(row[2])});
    }
    return rounded;
}

std::int64_t first_step(std::int64_t steps, double strength) {
    const auto all = static_cast<double>(steps);
    return static_cast<std::int64_t>(std::max(all - std::min(all * strength, all), 0.0));
}

float mix(float noise, float encoded, float sigma) {
    return sigma * noise + (1.0F - sigma) * encoded;
}

}  // namespace libsd35
