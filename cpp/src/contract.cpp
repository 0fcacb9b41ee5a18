#include "contract.hpp"

#include <algorithm>
#include <initializer_list>
#include <string>
#include <variant>
#include <vector>

#include "error.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

using Side = std::variant<std::int64_t, std::string>;

// Any fixed number.
const Side width = std::int64_t{-1};

// No engine takes as many at once.
constexpr std::int64_t most_images = 1 << 16;

// A type that may be float16 or float32.
constexpr std::string_view half = "half";

struct Expected {
    const char* name;
    std::string_view dtype;
    std::vector<Side> shape;
};

class Checker {
  public:
    explicit Checker(const Bundle& bundle) : bundle_(bundle) {}

    const Component& component(const std::string& name) const {
        const Component* found = bundle_.manifest().component(name);
        if (found == nullptr) throw refusal("it has no " + name);
        return *found;
    }

    // Every port that is expected is there, and no other.
    void ports(const Component& component, const std::vector<Port>& actual,
               const std::vector<Expected>& expected) const {
        for (const Expected& one : expected) port(component, actual, one);
        if (actual.size() == expected.size()) return;
        for (const Port& one : actual) {
            if (std::none_of(expected.begin(), expected.end(),
                             [&](const Expected& other) { return one.name == other.name; })) {
                throw refusal(component.name + " has a port " + shown(one.name) +
                              ", which this version does not know");
            }
        }
        throw refusal(component.name + " has a port twice");
    }

    void agree(bool condition, const std::string& what) const {
        if (!condition) throw refusal(what);
    }

    // The last side of a port, which is fixed.
    static std::int64_t last_side(const Port& port) {
        return std::get<std::int64_t>(port.shape.back());
    }

    Error refusal(const std::string& what) const {
        return bundle_error(bundle_.root().string() + " cannot be drawn from: " + what,
                            "build it again with: sd35-trt build");
    }

  private:
    void port(const Component& component, const std::vector<Port>& actual,
              const Expected& expected) const {
        const auto found = std::find_if(actual.begin(), actual.end(),
                                        [&](const Port& one) { return one.name == expected.name; });
        const std::string name = component.name + "'s " + expected.name;
        if (found == actual.end()) throw refusal("it has no " + name);
        const bool typed = expected.dtype == half
                               ? found->dtype == DType::float16 || found->dtype == DType::float32
                               : name_of(found->dtype) == expected.dtype;
        if (!typed) throw refusal(name + " is " + std::string(name_of(found->dtype)));
        if (!std::equal(found->shape.begin(), found->shape.end(), expected.shape.begin(),
                        expected.shape.end(), same_side)) {
            throw refusal(name + " has another shape than this version knows");
        }
    }

    static bool same_side(const Side& actual, const Side& expected) {
        return expected == width ? std::holds_alternative<std::int64_t>(actual)
                                 : actual == expected;
    }

    const Bundle& bundle_;
};

void check_text_encoder(const Checker& checker, const Manifest& manifest, const std::string& name) {
    const Component& encoder = checker.component(name);
    const auto tokenizer = manifest.tokenizers.find(name);
    checker.agree(tokenizer != manifest.tokenizers.end(), "it has no tokenizer of " + name);
    if (name == "t5") {
        checker.ports(encoder, encoder.inputs, {{"input_ids", "int64", {"batch", "tokens"}}});
        checker.ports(encoder, encoder.outputs, {{"hidden", half, {"batch", "tokens", width}}});
        return;
    }
    const std::int64_t length = tokenizer->second.length;
    checker.ports(encoder, encoder.inputs, {{"input_ids", "int64", {"batch", length}}});
    checker.ports(encoder, encoder.outputs,
                  {{"hidden", half, {"batch", length, width}}, {"pooled", half, {"batch", width}}});
}

void check_conditioner(const Checker& checker) {
    const Component& one = checker.component("conditioner");
    checker.ports(one, one.inputs,
                  {{"prompt_embeds", half, {"samples", "tokens", width}},
                   {"pooled", half, {"samples", width}},
                   {"timesteps", "float32", {"steps"}}});
    checker.ports(one, one.outputs,
                  {{"context", half, {"samples", "tokens", width}},
                   {"modulation", half, {"steps", "samples", width, width}}});
}

void check_denoiser(const Checker& checker, const Manifest& manifest) {
    const Component& one = checker.component("denoiser");
    const std::vector<Side> latents{"batch", manifest.latent_channels, "height", "width"};
    std::vector<Expected> inputs{{"latents", "float32", latents},
                                 {"sigma", "float32", {"batch"}},
                                 {"coefficients", "float32", {"batch", std::int64_t{3}}},
                                 {"previous_denoised", "float32", latents},
                                 {"context", half, {"batch", "tokens", width}},
                                 {"modulation", half, {"batch", width, width}}};
    if (manifest.guided) {
        inputs.push_back({"uncond_context", half, {"batch", "tokens", width}});
        inputs.push_back({"uncond_modulation", half, {"batch", width, width}});
        inputs.push_back({"guidance", "float32", {"batch"}});
    }
    checker.ports(one, one.inputs, inputs);
    checker.ports(one, one.outputs,
                  {{"next_latents", "float32", latents}, {"denoised", "float32", latents}});
}

void check_autoencoder(const Checker& checker, const Manifest& manifest) {
    const std::vector<Side> latents{"batch", manifest.latent_channels, "height", "width"};
    const std::vector<Side> image{"batch", "image_height", "image_width", std::int64_t{3}};
    const Component& decoder = checker.component("vae_decoder");
    checker.ports(decoder, decoder.inputs, {{"latents", "float32", latents}});
    checker.ports(decoder, decoder.outputs, {{"image", "uint8", image}});
    const Component& encoder = checker.component("vae_encoder");
    checker.ports(encoder, encoder.inputs, {{"image", "uint8", image}});
    checker.ports(encoder, encoder.outputs, {{"latents", "float32", latents}});
}

// What the text encoders give fits where the conditioner reads it.
void check_features(const Checker& checker, const Manifest& manifest) {
    const Component& conditioner = checker.component("conditioner");
    const std::int64_t room = Checker::last_side(*conditioner.input("prompt_embeds"));
    std::int64_t hidden = 0;
    std::int64_t pooled = 0;
    for (const char* name : {"clip_l", "clip_g"}) {
        hidden += Checker::last_side(*checker.component(name).output("hidden"));
        pooled += Checker::last_side(*checker.component(name).output("pooled"));
    }
    checker.agree(hidden <= room, "prompt_embeds has no room for both of CLIP's");
    checker.agree(pooled == Checker::last_side(*conditioner.input("pooled")),
                  "pooled is not as wide as both of CLIP's");
    const auto length = [&](const char* name) {
        return manifest.tokenizers.find(name)->second.length;
    };
    checker.agree(length("clip_l") == length("clip_g"), "CLIP's texts differ in length");
    if (const Component* t5 = manifest.component("t5")) {
        checker.agree(Checker::last_side(*t5->output("hidden")) == room,
                      "prompt_embeds is not as wide as T5's hidden");
    }
}

// What the conditioner gives is what the denoiser reads.
void check_conditioning(const Checker& checker, const Manifest& manifest) {
    const Component& conditioner = checker.component("conditioner");
    const Component& denoiser = checker.component("denoiser");
    const auto same = [&](const char* output, const std::string& input) {
        const Port& from = *conditioner.output(output);
        const Port& to = *denoiser.input(input);
        // Rows of modulation are as many; those of the context are tokens.
        const bool rows = from.shape.size() < 4 || from.shape[2] == to.shape[1];
        checker.agree(from.dtype == to.dtype && from.shape.back() == to.shape.back() && rows,
                      "the denoiser's " + input + " is not what the conditioner gives");
    };
    same("context", "context");
    same("modulation", "modulation");
    if (!manifest.guided) return;
    same("context", "uncond_context");
    same("modulation", "uncond_modulation");
}

}  // namespace

void check_contract(const Bundle& bundle) {
    const Checker checker(bundle);
    const Manifest& manifest = bundle.manifest();
    checker.agree(manifest.ranges.batch.first <= most_images,
                  "it draws " + std::to_string(manifest.ranges.batch.first) + " images at least");
    for (const char* name : {"clip_l", "clip_g"}) check_text_encoder(checker, manifest, name);
    if (manifest.component("t5") != nullptr) check_text_encoder(checker, manifest, "t5");
    check_conditioner(checker);
    check_denoiser(checker, manifest);
    check_autoencoder(checker, manifest);
    check_features(checker, manifest);
    check_conditioning(checker, manifest);
}

}  // namespace libsd35
