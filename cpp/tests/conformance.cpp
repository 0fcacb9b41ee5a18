// Draws the cases of cases.json by sd35.hpp, and writes what came of them.
//
//     conformance CASES NAME BUNDLE OUT [ADAPTER...]
//
// An adapter is known by its file's name without the suffix.
//
// For each case of the bundle with this name, OUT/N-M.latents and OUT/N-M.images hold the bytes of
// request M of case N, OUT/N-M.json its notes and parameters; OUT/N-0.denoised what each step of a
// case with "watch" took for the finished latents. OUT/encoded and OUT/decoded are of two pictures.
#include <filesystem>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sd35/sd35.hpp>
#include <string>
#include <vector>

namespace {

using nlohmann::json;

sd35::Picture picture_of(const json& size) {
    sd35::Picture picture{size.at(0), size.at(1), {}};
    for (std::uint32_t y = 0; y < picture.height; ++y) {
        for (std::uint32_t x = 0; x < picture.width; ++x) {
            for (std::uint32_t channel = 0; channel < 3; ++channel) {
                picture.pixels.push_back(static_cast<std::uint8_t>(x * (channel + 1) + 2 * y));
            }
        }
    }
    return picture;
}

sd35::Mask mask_of(const json& size, std::uint32_t offset) {
    sd35::Mask mask{size.at(0), size.at(1), {}};
    for (std::uint32_t y = 0; y < mask.height; ++y) {
        for (std::uint32_t x = 0; x < mask.width; ++x) {
            mask.pixels.push_back(static_cast<std::uint8_t>(x + y + offset));
        }
    }
    return mask;
}

// [width, height] of the picture that is started from, or of what latents are of.
json source_size(const json& fields) {
    if (fields.contains("image")) return fields.at("image");
    const json& sides = fields.at("latents");
    return {8 * sides.at(3).get<int>(), 8 * sides.at(2).get<int>()};
}

sd35::SkipLayerGuidance skip_layers_of(const json& fields) {
    sd35::SkipLayerGuidance skip;
    skip.layers = fields.at("skip_guidance_layers").get<std::vector<std::int64_t>>();
    skip.scale = fields.value("skip_layer_guidance_scale", skip.scale);
    skip.start = fields.value("skip_layer_guidance_start", skip.start);
    skip.stop = fields.value("skip_layer_guidance_stop", skip.stop);
    return skip;
}

std::map<std::string, sd35::Control> controls_of(const json& fields) {
    std::map<std::string, sd35::Control> controls;
    for (const auto& [name, given] : fields.items()) {
        sd35::Control control;
        control.image = picture_of(given.at("image"));
        control.scale = given.value("scale", control.scale);
        control.start = given.value("start", control.start);
        control.end = given.value("end", control.end);
        controls.emplace(name, std::move(control));
    }
    return controls;
}

sd35::Latents latents_of(const json& sides) {
    sd35::Latents latents{};
    std::size_t count = 1;
    for (std::size_t i = 0; i < 4; ++i) {
        latents.shape[i] = sides.at(i);
        count *= sides.at(i).get<std::size_t>();
    }
    for (std::size_t i = 0; i < count; ++i) {
        latents.values.push_back(static_cast<float>(i * 7 % 64) / 32.0F - 1.0F);
    }
    return latents;
}

template <typename T>
void read(const json& fields, const char* name, std::optional<T>& into) {
    if (fields.contains(name)) into = fields.at(name).get<T>();
}

std::vector<std::string> texts_of(const json& fields, const char* name) {
    return fields.value(name, std::vector<std::string>());
}

sd35::Request request_of(const json& fields) {
    sd35::Request request;
    request.prompts = fields.at("prompt").get<std::vector<std::string>>();
    request.negatives = texts_of(fields, "negative");
    request.prompts_2 = texts_of(fields, "prompt_2");
    request.prompts_3 = texts_of(fields, "prompt_3");
    request.negatives_2 = texts_of(fields, "negative_2");
    request.negatives_3 = texts_of(fields, "negative_3");
    request.weighting = fields.value("weighting", false);
    request.seed = fields.value("seed", std::uint64_t{0});
    request.seeds = fields.value("seeds", std::vector<std::uint64_t>());
    request.batch = fields.value("batch", 1);
    read(fields, "steps", request.steps);
    read(fields, "guidance", request.guidance);
    read(fields, "shift", request.shift);
    read(fields, "t5_tokens", request.t5_tokens);
    read(fields, "sampler", request.sampler);
    read(fields, "size", request.size);
    request.strength = fields.value("strength", request.strength);
    if (fields.contains("image")) request.image = picture_of(fields.at("image"));
    if (fields.contains("mask")) request.mask = mask_of(source_size(fields), fields.at("mask"));
    request.paste = fields.value("paste", false);
    if (fields.contains("skip_guidance_layers")) request.skip_layers = skip_layers_of(fields);
    request.adapters = fields.value("adapters", std::vector<sd35::Mix>());
    if (fields.contains("controls")) request.controls = controls_of(fields.at("controls"));
    if (fields.contains("latents")) request.latents = latents_of(fields.at("latents"));
    request.decode = fields.value("decode", true);
    return request;
}

template <typename T>
void write(const std::string& path, const sd35::Span<T>& values) {
    std::ofstream stream(path, std::ios::binary | std::ios::app);
    stream.write(reinterpret_cast<const char*>(values.data()),
                 static_cast<std::streamsize>(values.size() * sizeof(T)));
}

void write(const std::string& stem, const sd35::Result& result) {
    write(stem + ".latents", result.latents());
    for (std::size_t i = 0; result.decoded() && i < result.count(); ++i) {
        write(stem + ".images", result.image(i));
    }
    const json about{{"notes", result.notes()},
                     {"parameters", json::parse(result.parameters())},
                     {"seed", result.seed()}};
    std::ofstream(stem + ".json") << about;
}

void draw(sd35::Pipeline& pipeline, const json& asked, const std::string& stem) {
    std::vector<sd35::Request> requests;
    for (const json& fields : asked) requests.push_back(request_of(fields));
    if (asked.front().value("watch", false)) {
        requests.front().callback = [path = stem + "-0.denoised"](const sd35::Step& step) {
            write(path, step.denoised());
            return true;
        };
    }
    if (requests.size() == 1) {
        write(stem + "-0", pipeline.generate(requests.front()));
        return;
    }
    if (!pipeline.joins(requests[0], requests[1])) throw std::runtime_error("they do not join");
    const std::vector<sd35::Outcome> outcomes = pipeline.generate_joined(requests);
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
        write(stem + "-" + std::to_string(i), std::get<sd35::Result>(outcomes[i]));
    }
}

// Two pictures to latents, and back.
void encode(sd35::Pipeline& pipeline, const std::string& folder) {
    const sd35::Picture picture = picture_of({128, 64});
    const sd35::Latents latents = pipeline.encode({picture, picture});
    write(folder + "/encoded", sd35::Span<float>(latents.values.data(), latents.values.size()));
    for (const sd35::Picture& one : pipeline.decode(latents)) {
        write(folder + "/decoded", sd35::Span<std::uint8_t>(one.pixels.data(), one.pixels.size()));
    }
}

}  // namespace

int main(int count, char** arguments) {
    if (count < 5) {
        std::cerr << "usage: conformance CASES NAME BUNDLE OUT [ADAPTER...]\n";
        return 2;
    }
    const std::string name = arguments[2];
    try {
        std::ifstream stream(arguments[1]);
        const json cases = json::parse(stream).at("cases");
        sd35::LoadOptions options;
        options.threads = 1;
        sd35::Pipeline pipeline(arguments[3], options);
        for (int i = 5; i < count; ++i) {
            pipeline.load_adapter(std::filesystem::path(arguments[i]).stem().string(),
                                  arguments[i]);
        }
        for (std::size_t i = 0; i < cases.size(); ++i) {
            if (cases[i].at("bundle") != name) continue;
            draw(pipeline, cases[i].at("requests"), arguments[4] + ("/" + std::to_string(i)));
        }
        encode(pipeline, arguments[4]);
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    return 0;
}
