#include "renderer.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "components.hpp"
#include "contract.hpp"
#include "error.hpp"
#include "noise.hpp"
#include "result_notes.hpp"
#include "source_pictures.hpp"

namespace libsd35 {
namespace {

// Refuses what cannot be drawn before anything is opened.
Bundle checked(Bundle bundle) {
    check_engines(bundle);
    check_contract(bundle);
    return bundle;
}

Buffer rows_of(const Buffer& buffer, const Part& part) {
    return buffer.rows(static_cast<std::int64_t>(part.first),
                       static_cast<std::int64_t>(part.count));
}

// Latents of a picture with so much noise.
Buffer mixed(const Source& source, float sigma) {
    if (source.latents.shape() != source.noise.shape()) {
        // An engine that was built for one size may give others than that asked for.
        throw bundle_error("vae_encoder gave " + to_text(source.latents.shape()) + ", not " +
                               to_text(source.noise.shape()),
                           "build the bundle again");
    }
    Buffer latents = host_buffer(DType::float32, source.noise.shape());
    const std::size_t count = latents.bytes() / sizeof(float);
    for (std::size_t i = 0; i < count; ++i) {
        latents.data<float>()[i] =
            mix(source.noise.data<float>()[i], source.latents.data<float>()[i], sigma);
    }
    return latents;
}

}  // namespace

Renderer::Renderer(Bundle bundle, const RenderOptions& options)
    : bundle_(checked(std::move(bundle))),
      manifest_(bundle_.manifest()),
      log_(options.log),
      band_(LatentBand::of(bundle_)),
      train_timesteps_(std::trunc(manifest_.train_timesteps)),
      device_(open_device(device_of(bundle_, options.device))),
      loop_(*device_),
      engines_(bundle_, *device_, options.vram_budget, options.threads, log_),
      runner_(bundle_, *device_, engines_),
      feeder_(bundle_, *device_,
              options.vram_budget ? std::function<void()>([this] { loop_.forget(); }) : nullptr),
      text_(bundle_, *device_, runner_, feeder_, options.prompt_cache),
      vae_(*device_, runner_, manifest_) {
    engines_.before_denoiser_closes([this] { loop_.forget(); });
    fit(least_request(manifest_));
}

void Renderer::release() {
    engines_.release();
    feeder_.clear();
}

void Renderer::fit(const Request& request) {
    Dims dims = request.dims();
    const std::int64_t branches = manifest_.guided ? 2 : 1;
    dims["samples"] = branches * static_cast<std::int64_t>(request.count());
    dims["rank"] = AdapterInputs(manifest_, request.adapters).rank;
    Nets nets;
    for (const ControlUse& use : request.controls) nets.insert(use.name);
    engines_.fit(dims, nets);
}

Buffer Renderer::encode(const Buffer& images) {
    const Shape& shape = images.shape();
    const std::int64_t scale = manifest_.latent_scale;
    engines_.fit(vae_.dims(shape[0], shape[1] / scale, shape[2] / scale));
    return vae_.encode(images);
}

Buffer Renderer::decode(const Buffer& latents) {
    const Shape& shape = latents.shape();
    engines_.fit(vae_.dims(shape[0], shape[2], shape[3]));
    return vae_.decode(device_->upload(latents));
}

void Renderer::draw(const std::vector<Job*>& jobs, Clock& clock) {
    std::vector<const Request*> requests;
    std::vector<JobPart> parts;
    std::size_t first = 0;
    for (Job* job : jobs) {
        requests.push_back(&job->request);
        parts.push_back({job, {first, job->request.count()}});
        first += job->request.count();
    }
    const Request request = join_requests(requests);
    fit(request);
    LatentGuard guard(band_, manifest_, request);
    const auto report = [&] {
        anomalies_ += guard.anomalies().size();
        for (const auto& [_, anomaly] : guard.anomalies()) {
            log_.warn(bundle_.root().string() + ": " + anomaly.text());
        }
    };
    try {
        draw_parts(request, parts, guard, clock);
    } catch (...) {
        report();
        throw;
    }
    report();
}

void Renderer::draw_parts(const Request& request, const std::vector<JobPart>& parts,
                          LatentGuard& guard, Clock& clock) {
    const std::vector<SharedFeatures> features =
        text_.encode(texts_of(request), request.t5_tokens, {manifest_, request.adapters});
    clock.lap("text");
    std::vector<float> sigmas = make_sigmas(request.steps, request.shift, train_timesteps_);
    Source source{{}, noise(request)};
    Buffer latents = source.noise;
    if (!request.from_noise()) {
        // As diffusers' StableDiffusion3Img2ImgPipeline: the first steps are left out.
        sigmas.erase(sigmas.begin(), sigmas.begin() + first_step(request.steps, request.strength));
        source.latents = request.image ? vae_.encode(request.image) : request.latents;
        latents = mixed(source, sigmas.front());
    }
    std::optional<ControlRun> controls = controls_of(request, sigmas.size() - 1);
    if (source.latents || controls) clock.lap("encode");
    const Denoised last = denoise(request, sigmas, latents, source, features,
                                  controls ? &*controls : nullptr, parts, guard, clock);
    bool wanted = false;
    for (const auto& [job, part] : parts) {
        for (Anomaly& anomaly : guard.within(part)) job->anomalies.push_back(std::move(anomaly));
        wanted = wanted || !job->ended();
    }
    if (!wanted) return;
    const Buffer images = images_of(request, last.device);
    clock.lap("decode");
    for (const auto& [job, part] : parts) {
        if (job->ended()) continue;
        job->outcome = result_of(*job, part, features, images, last.host, clock);
    }
}

// The negative prompts where there is guidance, then the prompts; what the text encoders have of
// their adapters.
std::vector<MixedText> Renderer::texts_of(const Request& request) const {
    std::vector<MixedText> texts;
    const auto add = [&](const std::vector<Prompt>& prompts) {
        for (std::size_t i = 0; i < prompts.size(); ++i) {
            texts.emplace_back(prompts[i], of_texts(request.adapters[i]));
        }
    };
    if (manifest_.guided) add(request.negatives);
    add(request.prompts);
    return texts;
}

Schedule Renderer::schedule_of(const Request& request, const std::vector<float>& sigmas) const {
    Schedule schedule{sigmas, coefficients(request.sampler, sigmas), {}, manifest_.inpainting};
    if (manifest_.skip_layer_guidance) {
        schedule.skip_guidance = skip_scales(request.skips, request.guidance,
                                             static_cast<std::int64_t>(sigmas.size()) - 1);
    }
    return schedule;
}

Denoised Renderer::denoise(const Request& request, const std::vector<float>& sigmas,
                           const Buffer& latents, const Source& source,
                           const std::vector<SharedFeatures>& features, ControlRun* controls,
                           const std::vector<JobPart>& parts, LatentGuard& guard, Clock& clock) {
    const auto look = [&](const Step& step) { return after_step(step, parts, guard); };
    const bool watched = std::any_of(parts.begin(), parts.end(), [](const JobPart& one) {
        return one.job->callback != nullptr;
    });
    const Schedule schedule = schedule_of(request, sigmas);
    const AdapterInputs adapters(manifest_, request.adapters);
    std::vector<Mix> mixes;
    while (mixes.size() < features.size()) {
        mixes.insert(mixes.end(), request.adapters.begin(), request.adapters.end());
    }
    const std::vector<float> timesteps =
        make_timesteps({sigmas.begin(), sigmas.end() - 1}, train_timesteps_);
    std::vector<std::string> loop{"denoiser"};
    for (const ControlUse& use : request.controls) loop.push_back(control_part(use.name));
    const ConditioningMeans means{*device_, engines_, runner_};
    ConditioningSteps conditioning(means, {"conditioner", features, timesteps,
                                           feeder_.ports("conditioner", adapters, mixes), loop});
    if (controls != nullptr) controls->condition(means, features, timesteps);
    // Conditioners may be closed for it.
    Session& denoiser = engines_.use("denoiser");
    if (controls != nullptr) controls->open(engines_);
    if (request.decode) engines_.load_ahead("vae_decoder", "denoiser");
    const RunInputs inputs = run_inputs(*device_, manifest_, request, source,
                                        feeder_.ports("denoiser", adapters, request.adapters));
    return loop_.run(denoiser, latents, schedule, conditioning, look, watched, clock, inputs,
                     controls);
}

// False where nobody waits any more.
bool Renderer::after_step(const Step& step, const std::vector<JobPart>& parts,
                          LatentGuard& guard) const {
    guard.look(step.index, double{step.sigma}, step.latents);
    bool going = false;
    for (const auto& [job, part] : parts) {
        if (!job->ended()) check_finite(*job, part, guard);
        if (!job->ended()) job->after_step(step.part(part));
        going = going || !job->ended();
    }
    return going;
}

Buffer Renderer::noise(const Request& request) const {
    const auto count = static_cast<std::int64_t>(request.count());
    Buffer latents = host_buffer(
        DType::float32, {count, manifest_.latent_channels, request.height / request.latent_scale,
                         request.width / request.latent_scale});
    const std::size_t one = latents.bytes() / sizeof(float) / request.count();
    for (std::size_t i = 0; i < request.count(); ++i) {
        fill_noise(latents.data<float>() + i * one, one, request.seeds[i]);
    }
    return latents;
}

// uint8 [B, H, W, 3]; [0, H, W, 3] where nobody wants them.
Buffer Renderer::images_of(const Request& request, const Buffer& latents) {
    if (!request.decode) {
        return host_buffer(DType::uint8, {1, request.height, request.width, 3}).rows(0, 0);
    }
    const Buffer images = vae_.decode(latents);
    return request.paste ? pasted(images, request.image, request.mask) : images;
}

// The ControlNets of a run of so many steps; none where none runs in any.
std::optional<ControlRun> Renderer::controls_of(const Request& request, std::size_t steps) {
    ControlUses uses;
    for (const ControlUse& use : request.controls) {
        if (use.counts_at_all(static_cast<std::int64_t>(steps))) uses.push_back(use);
    }
    if (uses.empty()) return std::nullopt;
    std::vector<Buffer> hints;
    for (const ControlUse& use : uses) hints.push_back(vae_.encode(use.pictures, use.name));
    return std::optional<ControlRun>(std::in_place, *device_, manifest_, uses, hints, steps);
}

// Ends a job with an image that is not finite.
void Renderer::check_finite(Job& job, const Part& part, const LatentGuard& guard) const {
    for (const Anomaly& anomaly : guard.within(part)) {
        if (anomaly.finite) continue;
        const std::string what = "the latents are not finite after step " +
                                 std::to_string(anomaly.step + 1) + " (seed " +
                                 std::to_string(anomaly.seed) + ")";
        job.outcome = manifest_.all_fp32
                          ? Error(SD35_NOT_FINITE, what,
                                  "lower the guidance; the weights may be damaged, too")
                          : Error(SD35_NOT_FINITE, what + ": the model overflows in this precision",
                                  "build the bundle with: --policy fp32");
        return;
    }
}

Result Renderer::result_of(const Job& job, const Part& part,
                           const std::vector<SharedFeatures>& features, const Buffer& images,
                           const Buffer& latents, const Clock& clock) const {
    const SharedFeatures* first = features.data() + part.first;
    const auto run = static_cast<std::size_t>(latents.shape()[0]);
    const TextBranches branches =
        manifest_.guided ? TextBranches{first, first + run} : TextBranches{nullptr, first};
    // Copies: a view would keep the other jobs' images in memory.
    Result result{job.request.decode ? host_copy(rows_of(images, part)) : images,
                  host_copy(rows_of(latents, part)),
                  job.request.seeds,
                  job.request.parameters(),
                  {},
                  notes_of(job.request, branches),
                  job.anomalies};
    for (const std::string& note : result.notes) log_.warn(note);
    for (const Anomaly& anomaly : job.anomalies) result.notes.push_back(anomaly.text());
    result.timings.emplace_back("queue", seconds_between(job.created, clock.start()));
    result.timings.insert(result.timings.end(), clock.timings().begin(), clock.timings().end());
    result.timings.emplace_back("total", seconds_between(job.created, now()));
    return result;
}

}  // namespace libsd35
