// ControlNets of a request: which, with what pictures, how much, and in which steps.
#pragma once

#include <sd35/sd35.h>

#include <cstdint>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "manifest.hpp"

namespace libsd35 {

// A ControlNet in a run.
struct ControlUse {
    std::string name;
    Buffer pictures;            // uint8 [B, H, W, 3]
    std::vector<float> scales;  // of each image
    double scale;               // of the first image, as it was asked for
    double start;               // of the steps, the share after which it begins
    double end;                 // and at which it ends

    // Whether the net runs in a step; as diffusers' StableDiffusion3ControlNetPipeline.
    bool counts(std::int64_t step, std::int64_t steps) const;
    // Whether it runs in any.
    bool counts_at_all(std::int64_t steps) const;
    // Whether runs with it can be joined.
    bool joins(const ControlUse& other) const;
};

using ControlUses = std::vector<ControlUse>;

// The ControlNets of a request of so many images, in the bundle's order, those of scale 0 left
// out. Throws Error; names what is wrong with it.
ControlUses control_uses(const Manifest& manifest, const sd35_request& asked, std::int64_t width,
                         std::int64_t height, std::size_t count);

// Whether the nets of two requests are the same, in the same steps.
bool joins(const ControlUses& one, const ControlUses& other);

// Those of several requests that join, for all their images.
ControlUses join_controls(const std::vector<const ControlUses*>& requests);

}  // namespace libsd35
