#include "request.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "arguments.hpp"
#include "error.hpp"
#include "schedule.hpp"
#include "sizes.hpp"
#include "source_pictures.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

constexpr std::int64_t most_steps = 1000;
// What to do where the negative prompts are not as many as the prompts.
constexpr const char* negatives_advice =
    "give a text, which is for all prompts, or a list of one for each";

constexpr std::int64_t largest = std::numeric_limits<std::int32_t>::max();

std::vector<Prompt> prompts_of(const sd35_request& asked, std::uint32_t limit) {
    const std::vector<Prompt> prompts = make_prompts("prompt",
                                                     {{{asked.prompts, asked.prompt_count},
                                                       {asked.prompts_2, asked.prompt_2_count},
                                                       {asked.prompts_3, asked.prompt_3_count}}},
                                                     asked.weighting != 0, limit);
    if (prompts.empty()) throw usage_error("there is no prompt", "give one, which may be empty");
    return prompts;
}

std::vector<Prompt> negatives_of(const sd35_request& asked, std::size_t prompts,
                                 std::uint32_t limit) {
    const sd35_text nothing{"", 0};
    const GivenTexts first = asked.negative_count == 0
                                 ? GivenTexts{&nothing, 1}
                                 : GivenTexts{asked.negatives, asked.negative_count};
    std::vector<Prompt> negatives = make_prompts("negative",
                                                 {{first,
                                                   {asked.negatives_2, asked.negative_2_count},
                                                   {asked.negatives_3, asked.negative_3_count}}},
                                                 asked.weighting != 0, limit);
    if (negatives.size() == 1) negatives.resize(prompts, negatives.front());
    if (negatives.size() != prompts) {
        throw usage_error(std::to_string(negatives.size()) + " negative prompts for " +
                              std::to_string(prompts) + " prompts",
                          negatives_advice);
    }
    return negatives;
}

std::size_t count_of(const Manifest& manifest, std::size_t prompts, std::int64_t batch) {
    std::int64_t count = 0;
    if (__builtin_mul_overflow(static_cast<std::int64_t>(prompts), batch, &count)) {
        count = std::numeric_limits<std::int64_t>::max();
    }
    check_count(count, manifest);
    return static_cast<std::size_t>(count);
}

std::vector<std::uint64_t> seeds_of(const sd35_request& asked, std::size_t count) {
    if (asked.seeds != nullptr) {
        if (asked.seed_count != count) {
            throw usage_error(std::to_string(asked.seed_count) + " seeds for " +
                                  std::to_string(count) + " images",
                              "give a number, which counts up, or a list of one for each");
        }
        return {asked.seeds, asked.seeds + count};
    }
    const std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
    if (asked.seed > most - (count - 1)) {
        throw usage_error("seed of the last image must be 0 to " + std::to_string(most) +
                          ", not more");
    }
    std::vector<std::uint64_t> seeds;
    for (std::size_t i = 0; i < count; ++i) seeds.push_back(asked.seed + i);
    return seeds;
}

double guidance_of(const Manifest& manifest, double asked) {
    // The bundle's own values are what it was built for, whatever they are.
    const double given =
        is_set(asked) ? number("guidance", asked, 0, 100) : manifest.defaults.guidance;
    // As in diffusers: up to 1, the picture is that of the prompt alone.
    const double guidance = std::max(given, 1.0);
    if (!manifest.guided && guidance != 1.0) {
        throw usage_error(
            "this bundle was built without guidance, so guidance is 1, not " + general(guidance),
            "leave it out, or build with: --guidance");
    }
    return guidance;
}

std::string sampler_of(const Manifest& manifest, const char* asked) {
    std::string name = asked == nullptr ? manifest.defaults.sampler : asked;
    if (!is_sampler(name)) {
        std::vector<std::string> names(samplers.begin(), samplers.end());
        throw usage_error("unknown sampler " + shown(name), "use one of: " + join(names));
    }
    return name;
}

struct Size {
    std::int64_t width;
    std::int64_t height;
};

// (128, 64)
std::string pair_text(const Size& size) {
    return "(" + std::to_string(size.width) + ", " + std::to_string(size.height) + ")";
}

// Latents that are started from, one for each image: float32 [B, C, h, w]; empty where there are
// none.
Buffer source_latents(const Manifest& manifest, const sd35_request& asked, std::size_t count) {
    if (asked.latents == nullptr) return {};
    if (asked.image != nullptr) {
        throw usage_error("image and latents are both what to start from", "give one of them");
    }
    const Buffer given = check_latents(asked.latents, asked.latent_shape, manifest);
    const auto own = static_cast<std::size_t>(given.shape()[0]);
    if (own == count) return given;
    if (own != 1) {
        throw usage_error(std::to_string(own) + " latents for " + std::to_string(count) + " images",
                          "give one, or one each");
    }
    Shape shape = given.shape();
    shape[0] = static_cast<std::int64_t>(count);
    Buffer latents = host_buffer(DType::float32, shape);
    for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(latents.address() + i * given.bytes(), given.address(), given.bytes());
    }
    return latents;
}

// Width and height are both set or neither; with a picture, or latents of one, they are its.
Size size_of(const Manifest& manifest, const sd35_request& asked, const Buffer& latents) {
    Size size{manifest.defaults.width, manifest.defaults.height};
    const bool given = is_set(asked.width) || is_set(asked.height);
    if (given) {
        if (!is_set(asked.width) || !is_set(asked.height)) {
            throw usage_error("width and height must be given together");
        }
        size = {whole("width", asked.width, -largest, largest),
                whole("height", asked.height, -largest, largest)};
        check_size(size.width, size.height, manifest);
    }
    if (asked.image != nullptr) {
        const Size picture{asked.image_width, asked.image_height};
        if (given && (picture.width != size.width || picture.height != size.height)) {
            throw usage_error("image is " + std::to_string(picture.width) + "x" +
                                  std::to_string(picture.height) + ", the size is " +
                                  std::to_string(size.width) + "x" + std::to_string(size.height),
                              "give the image at its final size");
        }
        size = picture;
    }
    if (latents) {
        const Size own{latents.shape()[3] * manifest.latent_scale,
                       latents.shape()[2] * manifest.latent_scale};
        if (given && (own.width != size.width || own.height != size.height)) {
            throw usage_error(
                "size is " + pair_text(size) + ", that of the latents " + pair_text(own),
                "leave out the size");
        }
        size = own;
    }
    check_size(size.width, size.height, manifest);
    return size;
}

// The smallest strength that draws a step, with three decimals.
std::string least_strength(std::int64_t steps) {
    return general(std::ceil(1000.0 / static_cast<double>(steps)) / 1000.0);
}

template <typename T>
std::vector<T> repeated(const std::vector<T>& values, std::int64_t times) {
    std::vector<T> result;
    for (const T& value : values) {
        result.insert(result.end(), static_cast<std::size_t>(times), value);
    }
    return result;
}

// The texts of prompts, as make_prompts() takes them.
void add_texts(nlohmann::ordered_json& json, const std::string& name,
               const std::vector<Prompt>& prompts) {
    const auto column = [&](std::string Prompt::*encoder) {
        std::vector<std::string> texts;
        for (const Prompt& prompt : prompts) texts.push_back(prompt.*encoder);
        return texts;
    };
    const std::vector<std::string> first = column(&Prompt::clip_l);
    json[name] = first;
    if (const auto second = column(&Prompt::clip_g); second != first) json[name + "_2"] = second;
    if (const auto third = column(&Prompt::t5); third != first) json[name + "_3"] = third;
}

nlohmann::ordered_json scales_by_name(const Mix& mix) {
    auto scales = nlohmann::ordered_json::object();
    for (const Use& use : mix) scales[use.name] = use.scale;
    return scales;
}

template <typename T>
void append(std::vector<T>& to, const std::vector<T>& from) {
    to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

Dims Request::dims() const {
    return {{"batch", static_cast<std::int64_t>(seeds.size())},
            {"height", height / latent_scale},
            {"width", width / latent_scale},
            {"image_height", height},
            {"image_width", width}};
}

std::int64_t Request::drawn_steps() const {
    return from_noise() ? steps : steps - first_step(steps, strength);
}

bool Request::joins(const Request& other) const {
    if (!from_noise() || !other.from_noise()) return false;
    return width == other.width && height == other.height && steps == other.steps &&
           shift == other.shift && sampler == other.sampler && t5_tokens == other.t5_tokens &&
           decode == other.decode && libsd35::joins(controls, other.controls);
}

std::string Request::parameters() const {
    nlohmann::ordered_json json;
    add_texts(json, "prompt", prompts);
    add_texts(json, "negative", negatives);
    json["seed"] = seeds;
    json["steps"] = steps;
    json["guidance"] = guidance.front();
    json["shift"] = shift;
    json["size"] = {width, height};
    json["sampler"] = sampler;
    json["t5_tokens"] = t5_tokens;
    if (!from_noise()) json["strength"] = strength;
    if (prompts.front().weighted) json["weighting"] = true;
    if (paste) json["paste"] = true;
    if (std::any_of(adapters.begin(), adapters.end(),
                    [](const Mix& mix) { return !mix.empty(); })) {
        for (const Mix& mix : adapters) json["adapters"].push_back(scales_by_name(mix));
    }
    if (skips.front()) {
        json["skip_guidance_layers"] = skips.front()->layers;
        json["skip_layer_guidance_scale"] = skips.front()->scale;
        json["skip_layer_guidance_start"] = skips.front()->start;
        json["skip_layer_guidance_stop"] = skips.front()->stop;
    }
    for (const ControlUse& use : controls) {
        json["controls"][use.name] = {{"scale", use.scale}, {"start", use.start}, {"end", use.end}};
    }
    return json.dump();
}

Request make_request(const Manifest& manifest, const sd35_request& asked,
                     std::uint32_t max_prompt_chars, AdapterShelf* shelf) {
    const std::vector<Prompt> prompts = prompts_of(asked, max_prompt_chars);
    const std::vector<Prompt> negatives = negatives_of(asked, prompts.size(), max_prompt_chars);
    const std::int64_t batch = whole("batch", asked.batch, 1, largest);
    const std::size_t count = count_of(manifest, prompts.size(), batch);
    Request request{};
    request.seeds = seeds_of(asked, count);
    const Defaults& defaults = manifest.defaults;
    request.steps =
        whole("steps", is_set(asked.steps) ? asked.steps : defaults.steps, 1, most_steps);
    request.guidance.assign(count, guidance_of(manifest, asked.guidance));
    request.shift = is_set(asked.shift) ? number("shift", asked.shift, 0.01, 100) : manifest.shift;
    request.sampler = sampler_of(manifest, asked.sampler);
    const auto [shortest, longest] = manifest.ranges.t5_tokens;
    request.t5_tokens =
        whole("t5_tokens", is_set(asked.t5_tokens) ? asked.t5_tokens : defaults.t5_tokens, shortest,
              longest);
    request.strength = number("strength", asked.strength, 0, 1);
    request.latents = source_latents(manifest, asked, count);
    const Size size = size_of(manifest, asked, request.latents);
    const bool starts = asked.image != nullptr || asked.latents != nullptr;
    if (starts && first_step(request.steps, request.strength) == request.steps) {
        throw usage_error("strength " + general(request.strength) + " of " +
                              std::to_string(request.steps) + " steps is none",
                          "give at least " + least_strength(request.steps));
    }
    request.width = size.width;
    request.height = size.height;
    request.latent_scale = manifest.latent_scale;
    request.image = pixels_of(asked, count);
    request.paste = asked.paste != 0;
    request.decode = asked.decode != 0;
    if (request.paste && (request.latents || !request.decode)) {
        throw usage_error("paste is of pixels, and latents have none",
                          "give the picture as image, and decode it");
    }
    request.mask = mask_of(manifest, asked, size.width, size.height);
    request.skips.assign(count, skip_layers_of(manifest, asked));
    if (shelf != nullptr) request.adapters = shelf->mixes(asked, count);
    request.adapters.resize(count);
    request.controls = control_uses(manifest, asked, size.width, size.height, count);
    request.prompts = repeated(prompts, batch);
    request.negatives = repeated(negatives, batch);
    return request;
}

Request least_request(const Manifest& manifest) {
    sd35_request asked;
    sd35_request_init(&asked);
    const std::vector<sd35_text> prompts(static_cast<std::size_t>(manifest.ranges.batch.first),
                                         sd35_text{"", 0});
    asked.prompts = prompts.data();
    asked.prompt_count = prompts.size();
    return make_request(manifest, asked, usual_prompt_chars, nullptr);
}

Request join_requests(const std::vector<const Request*>& requests) {
    Request all = *requests.front();
    for (std::size_t i = 1; i < requests.size(); ++i) {
        append(all.prompts, requests[i]->prompts);
        append(all.negatives, requests[i]->negatives);
        append(all.seeds, requests[i]->seeds);
        append(all.guidance, requests[i]->guidance);
        append(all.skips, requests[i]->skips);
        append(all.adapters, requests[i]->adapters);
    }
    std::vector<const ControlUses*> controls;
    for (const Request* request : requests) controls.push_back(&request->controls);
    all.controls = join_controls(controls);
    return all;
}

}  // namespace libsd35
