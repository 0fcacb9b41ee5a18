// Whether the latents of a run look like those that calibration saw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "latent_band.hpp"
#include "request.hpp"

namespace libsd35 {

// One image's first deviation.
struct Anomaly {
    std::size_t image;  // its place in the request
    std::size_t step;   // index of the step after which it showed
    double sigma;       // noise level there
    std::uint64_t seed;
    std::string prompt;  // the first 12 hex digits of the prompt's SHA-256
    std::string what;    // "not finite", or the figure and what was expected
    bool finite;

    std::string text() const;
};

// Images of a run, `first` to `first + count - 1`.
struct Part {
    std::size_t first;
    std::size_t count;
};

// Whether guidance and shift of an image are such as the guard's margins were measured for, or the
// bundle's own: whether an anomaly is the engine's rather than the request's.
bool is_usual(const Manifest& manifest, const Request& request, std::size_t image);

// Looks at the latents after every step and finds each image's first anomaly.
//
// Statistics are compared where there is a band and the run is like calibration's: from noise, in
// 4 steps or more, and usual. Values that are not finite are found in every run.
class LatentGuard {
  public:
    LatentGuard(const std::optional<LatentBand>& band, const Manifest& manifest,
                const Request& request);

    // Checks one step; float32 latents [B, C, h, w] after it.
    void look(std::size_t step, double sigma, const Buffer& latents);

    // By place of the image in the request.
    const std::map<std::size_t, Anomaly>& anomalies() const noexcept { return anomalies_; }

    // The anomalies of some of the images, counted from the first of these.
    std::vector<Anomaly> within(const Part& part) const;

  private:
    void note(std::size_t image, std::size_t step, double sigma, std::string what, bool finite);

    const LatentBand* band_;
    const Request& request_;
    std::vector<bool> usual_;  // of each image
    std::map<std::size_t, Anomaly> anomalies_;
};

}  // namespace libsd35
