// One request on its way through a pipeline, and what comes of it.
#pragma once

#include <sd35/sd35.h>

#include <functional>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "buffer.hpp"
#include "clock.hpp"
#include "error.hpp"
#include "latent_guard.hpp"
#include "request.hpp"

namespace libsd35 {

// After a denoising step.
struct Step {
    std::size_t index;
    std::size_t total;
    float sigma;     // noise level after it
    Buffer latents;  // float32 [B, C, h, w] on the host, the loop's own
    // Fetches its estimate of the finished latents, of the same shape.
    std::function<Buffer()> denoised;

    // The same step as images of a part see it.
    Step part(const Part& images) const;
};

// What a callback's step took for the finished latents, fetched when it is first asked for. Throws
// Error.
const float* denoised_of(sd35_step_source* source);

// Images and how they came about; see sd35.h.
struct Result {
    Buffer images;   // uint8 [B, H, W, 3]; of a request that leaves them out [0, H, W, 3]
    Buffer latents;  // float32 [B, C, h, w]
    std::vector<std::uint64_t> seeds;
    std::string parameters;
    Timings timings;
    std::vector<std::string> notes;
    std::vector<Anomaly> anomalies;
};

// A request that is drawn, alone or in one run with others.
struct Job {
    Request request;
    sd35_callback callback = nullptr;
    void* callback_user = nullptr;
    Time created = now();
    std::vector<Anomaly> anomalies{};  // found so far
    // The result, or why there is none; nothing until it is known.
    std::variant<std::monostate, Result, Error> outcome{};

    bool ended() const noexcept { return outcome.index() != 0; }
    const Error* error() const noexcept { return std::get_if<Error>(&outcome); }
    Result* result() noexcept { return std::get_if<Result>(&outcome); }

    // Calls the callback, which may end the job.
    void after_step(const Step& step);
};

}  // namespace libsd35
