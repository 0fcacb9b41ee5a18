// What a manifest has to state of ControlNets; see contract.hpp.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "manifest.hpp"

namespace libsd35 {

// A port and its dimensions, those that are not numbers by name.
struct ExpectedPort {
    std::string port;
    std::vector<std::string> dims;
};

// Those that a component has to have.
struct ExpectedPorts {
    std::vector<ExpectedPort> inputs;
    std::vector<ExpectedPort> outputs;
};

// Dimensions of latents, and of what nets make as the denoiser and further nets take it.
std::vector<std::string> latent_dims();
std::vector<std::string> residual_dims();

// Of a component of the ControlNet of a name: those of the text are where the net has a text
// stream.
ExpectedPorts control_ports(const Component& component, std::string_view net);

// What is wrong with what is said of ControlNets, where each component is as it has to be.
std::optional<std::string> control_fault(const Manifest& manifest);

}  // namespace libsd35
