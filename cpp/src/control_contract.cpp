#include "control_contract.hpp"

#include <algorithm>

#include "components.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

using Names = std::vector<std::string>;

Names names_of(const std::vector<ControlRecord>& controls) {
    Names names;
    for (const ControlRecord& control : controls) names.push_back(control.name);
    return names;
}

bool has(const Names& names, const std::string& name) {
    return std::find(names.begin(), names.end(), name) != names.end();
}

// ['a', 'b']
std::string list_of(const Names& names) {
    Names quoted;
    for (const std::string& name : names) quoted.push_back(shown(name));
    return "[" + join(quoted) + "]";
}

std::optional<std::string> name_fault(const Manifest& manifest, const Names& names) {
    for (const std::string& name : names) {
        if (std::count(names.begin(), names.end(), name) > 1) {
            return "it has two ControlNets " + name;
        }
    }
    for (const std::string& name : names) {
        if (!is_net_name(name)) return shown(name) + " is no ControlNet's name";
    }
    if (names.empty() != manifest.takes_controls) return std::nullopt;
    return "it has the ControlNets " + list_of(names) + " and requires " +
           list_of({manifest.required.begin(), manifest.required.end()});
}

// Components that are missing, or of no net.
std::optional<std::string> component_fault(const Manifest& manifest, const Names& names) {
    Names listed;
    for (const std::string& name : names) {
        listed.push_back(control_conditioner(name));
        listed.push_back(control_part(name));
    }
    Names wanted = listed;
    if (!names.empty()) wanted.emplace_back("vae_encoder");
    for (const std::string& name : wanted) {
        if (manifest.component(name) == nullptr) return "it has no " + name;
    }
    for (const Component& one : manifest.components) {
        if (control_name(one.name) && !has(listed, one.name)) {
            return one.name + " is of no ControlNet that it lists";
        }
    }
    return std::nullopt;
}

// Types in which components that hand over to each other differ.
std::optional<std::string> mismatch(const Manifest& manifest, const std::string& name) {
    const Component& net = *manifest.component(control_part(name));
    const Component& conditioner = *manifest.component(control_conditioner(name));
    for (const Port& port : conditioner.outputs) {
        const Port* taken = net.input(port.name);
        if (taken != nullptr && taken->dtype == port.dtype) continue;
        return conditioner.name + " makes " + port.name + " in " +
               std::string(name_of(port.dtype)) + ", " + net.name + " takes another";
    }
    const DType made = net.input(residuals_port)->dtype;
    if (manifest.component("denoiser")->input(residuals_port)->dtype == made) return std::nullopt;
    return net.name + " makes " + std::string(name_of(made)) + ", the denoiser takes another";
}

}  // namespace

std::vector<std::string> latent_dims() {
    return {"batch", "channels", "height", "width"};
}

std::vector<std::string> residual_dims() {
    return {"control_blocks", "residual_samples", "residual_pixels", "modulation"};
}

ExpectedPorts control_ports(const Component& component, std::string_view net) {
    const std::string rows = control_part(net) + ".rows";
    const ExpectedPort context{"context", {"samples", "tokens", "context"}};
    ExpectedPorts ports;
    if (component.name == control_conditioner(net)) {
        ports.inputs = {{"pooled", {"samples", "pooled"}}, {"timesteps", {"steps"}}};
        ports.outputs = {{"modulation", {"steps", "samples", rows, "modulation"}}};
        if (component.input("prompt_embeds") != nullptr) {
            ports.inputs.push_back({"prompt_embeds", {"samples", "tokens", "embeds"}});
            ports.outputs.push_back(context);
        }
        return ports;
    }
    ports.inputs = {{"latents", latent_dims()},
                    {"hint", latent_dims()},
                    {"scale", {"batch"}},
                    {std::string(residuals_port), residual_dims()},
                    {"modulation", {"samples", rows, "modulation"}}};
    if (component.input("context") != nullptr) ports.inputs.push_back(context);
    ports.outputs = {{"next_residuals", {"control_blocks", "samples", "pixels", "modulation"}}};
    return ports;
}

std::optional<std::string> control_fault(const Manifest& manifest) {
    const Names names = names_of(manifest.controls);
    if (auto fault = name_fault(manifest, names)) return fault;
    if (auto fault = component_fault(manifest, names)) return fault;
    for (const std::string& name : names) {
        if (auto fault = mismatch(manifest, name)) return fault;
    }
    return std::nullopt;
}

}  // namespace libsd35
