// Drawing with one bundle on one device: text, noise, the loop, pictures.
#pragma once

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "autoencoder.hpp"
#include "conditioning.hpp"
#include "control_steps.hpp"
#include "denoise.hpp"
#include "engine_set.hpp"
#include "job.hpp"
#include "latent_guard.hpp"
#include "log.hpp"
#include "run_inputs.hpp"
#include "text_features.hpp"

namespace libsd35 {

struct RenderOptions {
    std::string device;  // empty takes the usual one
    std::optional<std::uint64_t> vram_budget;
    std::uint64_t prompt_cache;
    std::uint32_t threads;  // 0 takes all cores
    Log log;
};

// Draws jobs with a bundle's engines and watches their latents. One thread at a time, but for
// memory() and anomalies().
class Renderer {
  public:
    // Throws Error: engines that do not run on the device, a file that is no tokenizer, a budget
    // that is too small for the smallest request, or no such device.
    Renderer(Bundle bundle, const RenderOptions& options);

    const Bundle& bundle() const noexcept { return bundle_; }
    EngineSet& engines() noexcept { return engines_; }
    std::uint64_t anomalies() const noexcept { return anomalies_; }

    // Releases engines and adapters, which come back when they are used.
    void release();

    // Makes its device the calling thread's.
    void activate() { device_->activate(); }

    // Draws jobs in one run and sets the outcome of each; see Pipeline::draw. Throws Error where an
    // engine fails.
    void draw(const std::vector<Job*>& jobs, Clock& clock);

    // Latents of pictures, and pictures of latents, both on the host; see Pipeline.
    Buffer encode(const Buffer& images);
    Buffer decode(const Buffer& latents);

  private:
    // A job and its part of the images.
    struct JobPart {
        Job* job;
        Part part;
    };

    void fit(const Request& request);
    void draw_parts(const Request& request, const std::vector<JobPart>& parts, LatentGuard& guard,
                    Clock& clock);
    std::vector<MixedText> texts_of(const Request& request) const;
    Schedule schedule_of(const Request& request, const std::vector<float>& sigmas) const;
    std::optional<ControlRun> controls_of(const Request& request, std::size_t steps);
    Denoised denoise(const Request& request, const std::vector<float>& sigmas,
                     const Buffer& latents, const Source& source,
                     const std::vector<SharedFeatures>& features, ControlRun* controls,
                     const std::vector<JobPart>& parts, LatentGuard& guard, Clock& clock);
    bool after_step(const Step& step, const std::vector<JobPart>& parts, LatentGuard& guard) const;
    Buffer noise(const Request& request) const;
    Buffer images_of(const Request& request, const Buffer& latents);
    void check_finite(Job& job, const Part& part, const LatentGuard& guard) const;
    Result result_of(const Job& job, const Part& part, const std::vector<SharedFeatures>& features,
                     const Buffer& images, const Buffer& latents, const Clock& clock) const;

    Bundle bundle_;
    const Manifest& manifest_;
    Log log_;
    std::optional<LatentBand> band_;
    double train_timesteps_;
    std::atomic<std::uint64_t> anomalies_{0};
    std::unique_ptr<Device> device_;
    DenoiseLoop loop_;  // outlives the engines, whose closing it is told of
    EngineSet engines_;
    ComponentRunner runner_;
    AdapterFeeder feeder_;
    TextEncoder text_;
    Autoencoder vae_;
};

}  // namespace libsd35
