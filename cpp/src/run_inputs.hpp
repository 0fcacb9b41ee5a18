// What the denoiser is given in every step of a run, from the request.
#pragma once

#include "denoise_steps.hpp"
#include "request.hpp"

namespace libsd35 {

// What latents start from, besides noise: float32 [B, C, h, w] of the host.
struct Source {
    Buffer latents;  // of the picture; empty where there is none
    Buffer noise;    // of the seeds
};

// Inputs of a bundle's denoiser for a request; `adapters` are those for adapters. Throws Error.
RunInputs run_inputs(Device& device, const Manifest& manifest, const Request& request,
                     const Source& source, const Feed& adapters);

}  // namespace libsd35
