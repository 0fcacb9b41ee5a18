#include "runner.hpp"

#include <array>

#include "error.hpp"

namespace libsd35 {
namespace {

// What runs after a component, for loading it meanwhile; empty where nothing does.
std::string_view next_of(std::string_view name) {
    constexpr std::array<std::string_view, 5> order{"clip_l", "clip_g", "t5", "conditioner",
                                                    "denoiser"};
    for (std::size_t i = 0; i + 1 < order.size(); ++i) {
        if (order[i] == name) return order[i + 1];
    }
    return {};
}

}  // namespace

const Component& ComponentRunner::component(std::string_view name) const {
    const Component* found = bundle_.manifest().component(name);
    if (found == nullptr) {
        throw bundle_error(bundle_.root().string() + " has no " + std::string(name),
                           "build it again");
    }
    return *found;
}

Outputs ComponentRunner::run(std::string_view name, const Feed& inputs, const Dims& dims) {
    Session& session = engines_.use(name);
    Outputs outputs;
    Feed written;
    for (const Port& port : component(name).outputs) {
        Buffer buffer = device_.empty(port.dtype, port.resolve(dims));
        written.emplace_back(port.name, buffer);
        outputs.emplace(port.name, std::move(buffer));
    }
    if (const std::string_view next = next_of(name); !next.empty()) {
        engines_.load_ahead(next, name);
    }
    session.run(inputs, written);
    return outputs;
}

}  // namespace libsd35
