// Running one component of a bundle into new buffers.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "engine_set.hpp"

namespace libsd35 {

// Buffers by output port.
using Outputs = std::map<std::string, Buffer, std::less<>>;

// Runs components that run once a picture; the denoiser has DenoiseLoop.
class ComponentRunner {
  public:
    ComponentRunner(const Bundle& bundle, Device& device, EngineSet& engines)
        : bundle_(bundle), device_(device), engines_(engines) {}

    // What the manifest says of a component. Throws Error where it has none of this name.
    const Component& component(std::string_view name) const;

    // Runs a component on buffers of the device; `dims` are the sizes of the dynamic dimensions of
    // its outputs. The one after it begins to load meanwhile, if there is room. Throws Error.
    Outputs run(std::string_view name, const Feed& inputs, const Dims& dims);

  private:
    const Bundle& bundle_;
    Device& device_;
    EngineSet& engines_;
};

}  // namespace libsd35
