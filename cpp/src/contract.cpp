#include "contract.hpp"

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "components.hpp"
#include "control_contract.hpp"
#include "dtype.hpp"
#include "error.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

// No width of a network, and no number of its tokens, is larger.
constexpr std::int64_t largest = 1 << 20;

// No token of a vocabulary is.
constexpr std::int64_t largest_token = std::int64_t{1} << 31;

// Names of dynamic dimensions, which a builder may have pinned to a number. All other names are of
// one number each, the same wherever the name stands.
constexpr std::array<std::string_view, 13> dynamic{
    "batch",        "samples",     "tokens", "steps",   "height",           "width",
    "image_height", "image_width", "rank",   "skipped", "residual_samples", "residual_pixels",
    "pixels"};

// What names of dimensions stand for.
using Sizes = std::map<std::string, std::int64_t, std::less<>>;

std::vector<std::string> image() {
    return {"batch", "image_height", "image_width", "3"};
}

ExpectedPorts denoiser_ports(const Manifest& manifest) {
    ExpectedPorts ports{{{"latents", latent_dims()},
                         {"sigma", {"batch"}},
                         {"coefficients", {"batch", "3"}},
                         {"previous_denoised", latent_dims()},
                         {"context", {"batch", "tokens", "context"}},
                         {"modulation", {"batch", "rows", "modulation"}}},
                        {{"next_latents", latent_dims()}, {"denoised", latent_dims()}}};
    if (manifest.guided) {
        ports.inputs.push_back({"uncond_context", {"batch", "tokens", "context"}});
        ports.inputs.push_back({"uncond_modulation", {"batch", "rows", "modulation"}});
        ports.inputs.push_back({"guidance", {"batch"}});
    }
    if (manifest.inpainting) {
        ports.inputs.push_back({"mask", {"batch", "1", "height", "width"}});
        ports.inputs.push_back({"source", latent_dims()});
        ports.inputs.push_back({"source_noise", latent_dims()});
        ports.inputs.push_back({"next_sigma", {"batch"}});
    }
    if (manifest.takes_controls) {
        ports.inputs.push_back({std::string(residuals_port), residual_dims()});
    }
    if (manifest.skip_layer_guidance) {
        ports.inputs.push_back({"layer_mask", {"skipped", "layers"}});
        ports.inputs.push_back({"skip_guidance", {"batch"}});
    }
    return ports;
}

// Nothing where the component is a later version's; the manifest would require it.
std::optional<ExpectedPorts> ports_of(const Component& of, const Manifest& manifest) {
    const std::string& component = of.name;
    if (const auto net = control_name(component)) return control_ports(of, *net);
    if (component == "clip_l") {
        return ExpectedPorts{
            {{"input_ids", {"batch", "clip"}}},
            {{"hidden", {"batch", "clip", "clip_l"}}, {"pooled", {"batch", "clip_l_pooled"}}}};
    }
    if (component == "clip_g") {
        return ExpectedPorts{
            {{"input_ids", {"batch", "clip"}}},
            {{"hidden", {"batch", "clip", "clip_g"}}, {"pooled", {"batch", "clip_g_pooled"}}}};
    }
    if (component == "t5") {
        return ExpectedPorts{{{"input_ids", {"batch", "tokens"}}},
                             {{"hidden", {"batch", "tokens", "embeds"}}}};
    }
    if (component == "conditioner") {
        return ExpectedPorts{{{"prompt_embeds", {"samples", "tokens", "embeds"}},
                              {"pooled", {"samples", "pooled"}},
                              {"timesteps", {"steps"}}},
                             {{"context", {"samples", "tokens", "context"}},
                              {"modulation", {"steps", "samples", "rows", "modulation"}}}};
    }
    if (component == "denoiser") return denoiser_ports(manifest);
    if (component == "vae_decoder")
        return ExpectedPorts{{{"latents", latent_dims()}}, {{"image", image()}}};
    if (component == "vae_encoder") {
        ExpectedPorts ports{{{"image", image()}}, {{"latents", latent_dims()}}};
        if (manifest.takes_controls) ports.inputs.push_back({"encoding", {"batch", "3"}});
        return ports;
    }
    return std::nullopt;
}

// Inputs of a component for adapters.
std::vector<ExpectedPort> adapter_ports(const Component& component) {
    const std::string samples = component.name == "conditioner" ? "samples" : "batch";
    std::vector<ExpectedPort> ports{{"adapter_scales", {samples, "rank"}}};
    for (const AdapterGroup& group : component.adapters) {
        const std::string blocks = std::to_string(group.layers.size());
        const std::string linears = std::to_string(group.layers.front().size());
        const std::string own = component.name + "." + group.down;
        ports.push_back({group.down, {blocks, own + ".in", linears, "rank"}});
        ports.push_back({group.up, {blocks, linears, "rank", own + ".out"}});
    }
    return ports;
}

bool takes_adapters(std::string_view component) {
    return component == "clip_l" || component == "clip_g" || component == "conditioner" ||
           component == "denoiser";
}

// A name that occurs twice; nothing where none does.
std::optional<std::string> repeated_layer(const Component& component) {
    std::set<std::string> seen;
    for (const AdapterGroup& group : component.adapters) {
        for (const auto& block : group.layers) {
            for (const std::string& layer : block) {
                if (!seen.insert(layer).second) return layer;
            }
        }
    }
    return std::nullopt;
}

// What a port may hold: of what was computed, either of two, in the policy's precision.
std::vector<std::string> dtypes_of(std::string_view port) {
    if (port == "input_ids") return {"int64"};
    if (port == "image") return {"uint8"};
    for (const std::string_view exact :
         {"timesteps", "latents", "sigma", "coefficients", "previous_denoised", "guidance",
          "next_latents", "denoised", "mask", "source", "source_noise", "next_sigma", "layer_mask",
          "skip_guidance", "hint", "scale", "encoding"}) {
        if (port == exact) return {"float32"};
    }
    return {"float16", "float32"};
}

bool is_dynamic(std::string_view dim) {
    return std::find(dynamic.begin(), dynamic.end(), dim) != dynamic.end();
}

std::string shape_of(const Port& port) {
    std::vector<std::string> sides;
    for (const auto& side : port.shape) {
        const auto* number = std::get_if<std::int64_t>(&side);
        sides.push_back(number != nullptr ? std::to_string(*number)
                                          : shown(std::get<std::string>(side)));
    }
    return "[" + join(sides) + "]";
}

class Checker {
  public:
    explicit Checker(const Bundle& bundle)
        : bundle_(bundle),
          manifest_(bundle.manifest()),
          sizes_{{"channels", manifest_.latent_channels}} {}

    void check() {
        check_names();
        for (const Component& component : manifest_.components) check_component(component);
        if (const auto fault = control_fault(manifest_)) refuse(*fault);
        check_features();
        for (const char* name : {"clip_l", "clip_g", "t5"}) {
            if (manifest_.component(name) != nullptr) check_tokenizer(name);
        }
    }

  private:
    [[noreturn]] void refuse(const std::string& fault) const {
        throw bundle_error(bundle_.root().string() + ": " + fault,
                           "build it again with: sd35-trt build");
    }

    void check_names() const {
        for (const Component& one : manifest_.components) {
            if (manifest_.component(one.name) != &one) refuse("it has two components " + one.name);
        }
        for (const char* name : {"clip_l", "clip_g", "conditioner", "denoiser", "vae_decoder"}) {
            if (manifest_.component(name) == nullptr) refuse("it has no " + std::string(name));
        }
    }

    void check_component(const Component& component) {
        auto expected = ports_of(component, manifest_);
        if (!expected) return;
        if (!component.adapters.empty()) {
            check_adapters(component);
            for (ExpectedPort& port : adapter_ports(component)) {
                expected->inputs.push_back(std::move(port));
            }
        }
        check_ports(component.name, "input", component.inputs, expected->inputs);
        check_ports(component.name, "output", component.outputs, expected->outputs);
        for (const auto& [dim, bounds] : component.bounds) {
            const auto [low, high] = bounds;
            const std::int64_t least = dim == "skipped" ? 0 : 1;
            if (!(least <= low && low <= high && high <= largest)) {
                refuse("bounds of " + dim + " of " + component.name + " are " +
                       std::to_string(low) + " to " + std::to_string(high));
            }
        }
        // Inputs that nobody would feed; further outputs may be left out.
        if (component.inputs.size() == expected->inputs.size()) return;
        for (const Port& port : component.inputs) {
            if (std::none_of(expected->inputs.begin(), expected->inputs.end(),
                             [&](const ExpectedPort& one) { return one.port == port.name; })) {
                refuse(component.name + " has an input " + port.name + ", which is unknown");
            }
        }
        refuse(component.name + " has an input twice");
    }

    // What is said of a component's adapters.
    void check_adapters(const Component& component) const {
        const std::vector<std::int64_t>& ranks = manifest_.adapter_ranks;
        if (!takes_adapters(component.name)) refuse(component.name + " takes adapters");
        const bool ascending =
            std::adjacent_find(ranks.begin(), ranks.end(), std::greater_equal<>()) == ranks.end();
        if (ranks.empty() || !ascending || ranks.back() > largest) {
            refuse(component.name + " takes adapters of the ranks " + to_text(ranks));
        }
        for (const AdapterGroup& group : component.adapters) {
            const std::size_t linears = group.layers.front().size();
            if (std::any_of(group.layers.begin(), group.layers.end(),
                            [&](const auto& block) { return block.size() != linears; })) {
                refuse(component.name + " has blocks of different linears in " + group.down);
            }
        }
        if (const auto layer = repeated_layer(component)) {
            refuse(component.name + " takes two adapters of " + *layer);
        }
        const auto bounds = component.bounds.find("rank");
        if (bounds == component.bounds.end()) return;
        const auto [low, high] = bounds->second;
        if (low != 1 || high < ranks.back()) {
            refuse("bounds of rank of " + component.name + " are " + std::to_string(low) + " to " +
                   std::to_string(high));
        }
    }

    void check_ports(const std::string& component, const std::string& kind,
                     const std::vector<Port>& found, const std::vector<ExpectedPort>& expected) {
        for (const auto& [name, dims] : expected) {
            const std::string what = kind + " " + name;
            const auto port =
                std::find_if(found.begin(), found.end(),
                             [&name = name](const Port& one) { return one.name == name; });
            if (port == found.end()) refuse(component + " has no " + what);
            const std::vector<std::string> dtypes = dtypes_of(name);
            const std::string dtype(name_of(port->dtype));
            if (std::find(dtypes.begin(), dtypes.end(), dtype) == dtypes.end()) {
                refuse(what + " of " + component + " is " + dtype + ", not " +
                       join(dtypes, " or "));
            }
            if (!fits(*port, dims)) {
                refuse(what + " of " + component + " is " + shape_of(*port) + ", not " +
                       expected_shape(dims));
            }
        }
    }

    bool fits(const Port& port, const std::vector<std::string>& dims) {
        if (port.shape.size() != dims.size()) return false;
        for (std::size_t i = 0; i < dims.size(); ++i) {
            const auto* number = std::get_if<std::int64_t>(&port.shape[i]);
            if (number == nullptr) {
                const auto& name = std::get<std::string>(port.shape[i]);
                if (!is_dynamic(dims[i]) || name != dims[i]) return false;
            } else if (!is_size_of(*number, dims[i])) {
                return false;
            }
        }
        return true;
    }

    // A name that is new gets its number.
    bool is_size_of(std::int64_t number, const std::string& dim) {
        if (number < 1 || number > largest) return false;
        if (is_dynamic(dim)) return true;
        if (dim.find_first_not_of("0123456789") == std::string::npos) {
            return dim == std::to_string(number);
        }
        return sizes_.emplace(dim, number).first->second == number;
    }

    std::string expected_shape(const std::vector<std::string>& dims) const {
        std::vector<std::string> sides;
        for (const std::string& dim : dims) {
            const auto known = sizes_.find(dim);
            sides.push_back(known == sizes_.end() ? dim : std::to_string(known->second));
        }
        return "[" + join(sides) + "]";
    }

    std::int64_t size(std::string_view name) const { return sizes_.find(name)->second; }

    // What the text encoders give fits where the conditioner reads it.
    void check_features() const {
        if (manifest_.skip_layer_guidance && !manifest_.guided) {
            refuse("it has skip-layer guidance without guidance");
        }
        const std::int64_t pooled = size("clip_l_pooled") + size("clip_g_pooled");
        if (pooled != size("pooled")) {
            refuse("conditioner takes pooled of " + std::to_string(size("pooled")) + ", CLIP has " +
                   std::to_string(pooled));
        }
        const std::int64_t hidden = size("clip_l") + size("clip_g");
        if (hidden > size("embeds")) {
            refuse("conditioner takes prompt_embeds of " + std::to_string(size("embeds")) +
                   ", CLIP alone has " + std::to_string(hidden));
        }
    }

    void check_tokenizer(const std::string& name) const {
        const auto found = manifest_.tokenizers.find(name);
        if (found == manifest_.tokenizers.end()) refuse("it has no tokenizer of " + name);
        const auto& [_, length, pad_id] = found->second;
        const std::string pads = "the tokenizer of " + name + " pads to " + std::to_string(length);
        if (length > largest || pad_id >= largest_token) {
            refuse(pads + " with " + std::to_string(pad_id));
        }
        if (name != "t5" && length != size("clip")) {
            refuse(pads + ", the encoder reads " + std::to_string(size("clip")));
        }
    }

    const Bundle& bundle_;
    const Manifest& manifest_;
    Sizes sizes_;
};

}  // namespace

void check_contract(const Bundle& bundle) {
    Checker(bundle).check();
}

}  // namespace libsd35
