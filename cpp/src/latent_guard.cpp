#include "latent_guard.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include "sha256.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

constexpr std::int64_t fewest_steps = 4;

// What the margins were measured for; see runtime/latent_guard.py.
constexpr double most_guidance = 7.0;
constexpr Extent usual_shifts{1.0, 6.0};

// Side by side, so that the compiler can use vectors.
constexpr std::size_t lanes = 8;

struct Sums {
    double values = 0;
    double squares = 0;
};

Sums add_up(const float* values, std::size_t count) {
    std::array<double, lanes> sums{};
    std::array<double, lanes> squares{};
    const std::size_t whole = count - count % lanes;
    for (std::size_t i = 0; i < whole; i += lanes) {
        for (std::size_t k = 0; k < lanes; ++k) {
            const double value{values[i + k]};
            sums[k] += value;
            squares[k] += value * value;
        }
    }
    Sums total;
    for (std::size_t k = 0; k < lanes; ++k) {
        total.values += sums[k];
        total.squares += squares[k];
    }
    for (std::size_t i = whole; i < count; ++i) {
        total.values += double{values[i]};
        total.squares += double{values[i]} * double{values[i]};
    }
    return total;
}

std::string unlike(const char* name, double value, const Extent& expected) {
    return std::string(name) + " of the latents " + general(value, 3) + ", expected " +
           general(expected.low, 3) + " to " + general(expected.high, 3);
}

bool lies_in(double value, const Extent& extent) {
    return value >= extent.low && value <= extent.high;
}

}  // namespace

std::string Anomaly::text() const {
    return "anomaly at step " + std::to_string(step + 1) + " (sigma " + fixed(sigma, 3) +
           "), seed " + std::to_string(seed) + ", prompt " + prompt + ": " + what;
}

bool is_usual(const Manifest& manifest, const Request& request, std::size_t image) {
    const Extent shifts{std::min(manifest.shift, usual_shifts.low),
                        std::max(manifest.shift, usual_shifts.high)};
    return lies_in(request.shift, shifts) &&
           request.guidance[image] <= std::max(manifest.defaults.guidance, most_guidance);
}

LatentGuard::LatentGuard(const std::optional<LatentBand>& band, const Manifest& manifest,
                         const Request& request)
    : band_(band && request.from_noise() && request.steps >= fewest_steps ? &*band : nullptr),
      request_(request) {
    for (std::size_t image = 0; image < request.count(); ++image) {
        usual_.push_back(is_usual(manifest, request, image));
    }
}

void LatentGuard::look(std::size_t step, double sigma, const Buffer& latents) {
    const auto images = static_cast<std::size_t>(latents.shape()[0]);
    const std::size_t count = latents.bytes() / sizeof(float) / std::max<std::size_t>(images, 1);
    const auto expected = band_ == nullptr ? std::nullopt : std::optional(band_->at(sigma));
    for (std::size_t i = 0; i < images; ++i) {
        const auto noted = anomalies_.find(i);
        const bool known = noted != anomalies_.end();
        const Sums sums = add_up(latents.data<float>() + i * count, count);
        // Squares of float32 never leave float64: this is NaN or infinite where a value is.
        if (!std::isfinite(sums.squares)) {
            // Worse than a statistic, which may have been noted in an earlier step.
            if (!known || noted->second.finite)
                note(i, step, sigma, "latents are not finite", false);
            continue;
        }
        if (!expected || known || !usual_[i]) continue;
        const double mean = sums.values / static_cast<double>(count);
        const double variance = sums.squares / static_cast<double>(count) - mean * mean;
        const double deviation = std::sqrt(std::max(variance, 0.0));
        if (!lies_in(mean, expected->mean)) {
            note(i, step, sigma, unlike("mean", mean, expected->mean), true);
        } else if (!lies_in(deviation, expected->deviation)) {
            note(i, step, sigma, unlike("deviation", deviation, expected->deviation), true);
        }
    }
}

std::vector<Anomaly> LatentGuard::within(const Part& part) const {
    std::vector<Anomaly> found;
    for (const auto& [image, anomaly] : anomalies_) {
        if (image < part.first || image >= part.first + part.count) continue;
        found.push_back(anomaly);
        found.back().image -= part.first;
    }
    return found;
}

void LatentGuard::note(std::size_t image, std::size_t step, double sigma, std::string what,
                       bool finite) {
    const std::string prompt = sha256(request_.prompts[image].clip_l).substr(0, 12);
    anomalies_[image] =
        Anomaly{image, step, sigma, request_.seeds[image], prompt, std::move(what), finite};
}

}  // namespace libsd35
