// Mean and deviation that latents had in calibration, by noise level.
#pragma once

#include <optional>
#include <vector>

#include "bundle.hpp"

namespace libsd35 {

// Smallest and largest.
struct Extent {
    double low;
    double high;
};

class LatentBand {
  public:
    // What a healthy image has at a noise level.
    struct Expected {
        Extent mean;
        Extent deviation;
    };

    // That of the calibration in a bundle; nothing where it holds none. Throws Error where the
    // calibration has another form.
    static std::optional<LatentBand> of(const Bundle& bundle);

    Expected at(double sigma) const;

  private:
    struct Point {
        double sigma;
        Extent mean;
        Extent deviation;
    };

    explicit LatentBand(std::vector<Point> points) : points_(std::move(points)) {}
    Point between(double sigma) const;

    std::vector<Point> points_;  // by sigma, ascending; at least one
};

}  // namespace libsd35
