#include "components.hpp"

namespace libsd35 {
namespace {

constexpr std::string_view prefix = "control_";
constexpr std::string_view conditioner = "_conditioner";
constexpr std::size_t longest_net_name = 40;

bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

}  // namespace

bool is_net_name(std::string_view name) {
    // A net named so would have the component that is another's conditioner.
    if (ends_with(name, conditioner.substr(1))) return false;
    return !name.empty() && name.size() <= longest_net_name &&
           name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") ==
               std::string_view::npos;
}

std::string control_part(std::string_view net) {
    return std::string(prefix) + std::string(net);
}

std::string control_conditioner(std::string_view net) {
    return control_part(net) + std::string(conditioner);
}

std::optional<std::string> control_name(std::string_view component) {
    if (component.substr(0, prefix.size()) != prefix) return std::nullopt;
    std::string_view name = component.substr(prefix.size());
    if (ends_with(name, conditioner)) name.remove_suffix(conditioner.size());
    return is_net_name(name) ? std::optional(std::string(name)) : std::nullopt;
}

bool runs_every_step(std::string_view component) {
    return component == "denoiser" ||
           (control_name(component) && !ends_with(component, conditioner));
}

}  // namespace libsd35
