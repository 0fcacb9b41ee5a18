// What a device is: where buffers live and work is queued.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "plugin/interface.h"

namespace libsd35 {

struct DeviceMemory {
    std::uint64_t used;   // by this process since the device was opened
    std::uint64_t peak;   // the largest that was seen
    std::uint64_t total;  // 0 where the device does not say
};

// A copy on its way to the host.
class Fetch {
  public:
    virtual ~Fetch() = default;

    // The array, once it is there; overwritten when its slot is used again.
    virtual Buffer wait() = 0;
    // What is queued from now on runs after the copy: the source may be overwritten.
    virtual void fence() = 0;
};

// Recorded work.
class RecordedGraph {
  public:
    virtual ~RecordedGraph() = default;

    // Queues it once more, on the same buffers.
    virtual void replay() = 0;
};

// All may throw Error.
class Device {
  public:
    virtual ~Device() = default;

    virtual std::string name() const = 0;
    // For engines.
    virtual sd35_plugin_place place() = 0;
    virtual bool is_gpu() const = 0;
    // Whether work is done later than it is asked for.
    virtual bool queues() const = 0;

    // Makes it the calling thread's device.
    virtual void activate() = 0;
    // A new buffer with any content.
    virtual Buffer empty(DType dtype, Shape shape) = 0;
    // An array of the host on the device, which may share its memory.
    virtual Buffer upload(const Buffer& array) = 0;
    // Queues a copy between buffers of as many bytes.
    virtual void copy(const Buffer& source, const Buffer& target) = 0;
    // The content on the host when all queued work is done; may share its memory.
    virtual Buffer download(const Buffer& buffer) = 0;
    // Host memory that fetch() copies to; none where it does not copy.
    virtual std::vector<Buffer> slots(const Shape& shape, std::size_t count) = 0;
    // Begins to copy a buffer to the host, beside the work that is queued after this.
    virtual std::unique_ptr<Fetch> fetch(const Buffer& buffer, const Buffer& slot) = 0;
    // Records what `work` queues, without doing it.
    virtual std::unique_ptr<RecordedGraph> capture(const std::function<void()>& work) = 0;
    // Changes when the address of the engines' working memory does.
    virtual std::uint64_t scratch_version() const = 0;
    // Waits until all queued work is done.
    virtual void synchronize() = 0;
    // Gives back the memory that nobody uses.
    virtual void trim() = 0;
    virtual DeviceMemory memory() = 0;
};

// A device by name: cpu, cuda (the first GPU) or cuda:N. Throws Error.
std::unique_ptr<Device> open_device(const std::string& name);

}  // namespace libsd35
