// Names of components that a bundle may have besides those of every model: those of ControlNets.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace libsd35 {

// Whether a ControlNet can be called so.
bool is_net_name(std::string_view name);

// The component of every step of the ControlNet of a name.
std::string control_part(std::string_view net);

// Its component that depends on the prompt and the timestep alone.
std::string control_conditioner(std::string_view net);

// The ControlNet that a component is of; nothing where it is of none.
std::optional<std::string> control_name(std::string_view component);

// Whether a component runs in every step of a picture: the denoiser and ControlNets.
bool runs_every_step(std::string_view component);

}  // namespace libsd35
