// An engine ready to run on buffers that it does not own.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "buffer.hpp"
#include "bundle.hpp"
#include "device.hpp"

namespace libsd35 {

// Buffers by port.
using Feed = std::vector<std::pair<std::string_view, Buffer>>;

struct SessionOptions {
    std::uint32_t threads = 0;                // of the engine; 0 takes all cores
    std::optional<std::uint64_t> held_bytes;  // of its weights on the device, the others streaming
};

class Session {
  public:
    virtual ~Session() = default;

    // Whether run() only queues work of fixed shapes and addresses, so that a graph can record it.
    virtual bool recordable() const = 0;
    // Computes all outputs into the given buffers, in the order of the device's queue.
    virtual void run(const Feed& inputs, const Feed& outputs) = 0;
};

// Loads a component's engine. Throws Error.
std::unique_ptr<Session> open_session(const Bundle& bundle, const Component& component,
                                      Device& device, const SessionOptions& options);

}  // namespace libsd35
