#include "gpu_device.hpp"

#include <cstring>

#include "error.hpp"
#include "plugin/loading.hpp"
#include "plugin/message.hpp"

namespace libsd35 {
namespace {

// An open device, which lives as long as anything on it.
class Handle {
  public:
    Handle(const sd35_plugin_device& functions, int index) : functions_(functions) {
        call_plugin([&](sd35_plugin_message* message) {
            return functions_.open(index, &device_, message);
        });
    }
    ~Handle() { functions_.close(device_); }
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;

    const sd35_plugin_device& functions() const noexcept { return functions_; }
    void* device() const noexcept { return device_; }

  private:
    const sd35_plugin_device& functions_;
    void* device_ = nullptr;
};

using SharedHandle = std::shared_ptr<const Handle>;

class GpuFetch final : public Fetch {
  public:
    GpuFetch(SharedHandle handle, Buffer source, Buffer slot)
        : handle_(std::move(handle)), source_(std::move(source)), slot_(std::move(slot)) {
        call_plugin([&](sd35_plugin_message* message) {
            return handle_->functions().fetch(handle_->device(), source_.address(), slot_.address(),
                                              source_.bytes(), &fetch_, message);
        });
    }
    ~GpuFetch() override { handle_->functions().fetch_free(fetch_); }
    GpuFetch(const GpuFetch&) = delete;
    GpuFetch& operator=(const GpuFetch&) = delete;

    Buffer wait() override {
        call_plugin([&](sd35_plugin_message* message) {
            return handle_->functions().fetch_wait(fetch_, message);
        });
        return slot_;
    }

    void fence() override {
        call_plugin([&](sd35_plugin_message* message) {
            return handle_->functions().fetch_fence(fetch_, message);
        });
    }

  private:
    SharedHandle handle_;
    Buffer source_;  // not freed before the copy
    Buffer slot_;
    void* fetch_ = nullptr;
};

class GpuGraph final : public RecordedGraph {
  public:
    GpuGraph(SharedHandle handle, void* graph) : handle_(std::move(handle)), graph_(graph) {}
    ~GpuGraph() override { handle_->functions().graph_free(graph_); }
    GpuGraph(const GpuGraph&) = delete;
    GpuGraph& operator=(const GpuGraph&) = delete;

    void replay() override {
        call_plugin([&](sd35_plugin_message* message) {
            return handle_->functions().replay(handle_->device(), graph_, message);
        });
    }

  private:
    SharedHandle handle_;
    void* graph_;
};

class GpuDevice final : public Device {
  public:
    GpuDevice(const sd35_plugin_device& functions, int index)
        : index_(index), handle_(std::make_shared<const Handle>(functions, index)) {}

    std::string name() const override { return "cuda:" + std::to_string(index_); }
    sd35_plugin_place place() override { return functions().place(device()); }
    bool is_gpu() const override { return true; }
    bool queues() const override { return true; }

    void activate() override {
        call_plugin(
            [&](sd35_plugin_message* message) { return functions().activate(device(), message); });
    }

    Buffer empty(DType dtype, Shape shape) override {
        const std::size_t bytes = byte_count(shape, dtype);
        void* address = nullptr;
        call_plugin([&](sd35_plugin_message* message) {
            return functions().allocate(device(), bytes, &address, message);
        });
        const SharedHandle handle = handle_;
        const std::shared_ptr<void> owner(address, [handle](void* memory) {
            handle->functions().release(handle->device(), memory);
        });
        return Buffer(owner, static_cast<std::byte*>(address), dtype, std::move(shape));
    }

    Buffer upload(const Buffer& array) override {
        Buffer buffer = empty(array.dtype(), array.shape());
        call_plugin([&](sd35_plugin_message* message) {
            return functions().upload(device(), array.address(), buffer.address(), array.bytes(),
                                      message);
        });
        return buffer;
    }

    void copy(const Buffer& source, const Buffer& target) override {
        if (source.bytes() != target.bytes()) {
            throw bundle_error("a tensor of shape " + to_text(source.shape()) +
                                   " does not fit one of " + to_text(target.shape()),
                               "build the bundle again");
        }
        call_plugin([&](sd35_plugin_message* message) {
            return functions().copy(device(), source.address(), target.address(), source.bytes(),
                                    message);
        });
    }

    Buffer download(const Buffer& buffer) override {
        Buffer array = host_buffer(buffer.dtype(), buffer.shape());
        call_plugin([&](sd35_plugin_message* message) {
            return functions().download(device(), buffer.address(), array.address(), buffer.bytes(),
                                        message);
        });
        return array;
    }

    std::vector<Buffer> slots(const Shape& shape, std::size_t count) override {
        std::vector<Buffer> pinned;
        for (std::size_t i = 0; i < count; ++i) pinned.push_back(pinned_buffer(shape));
        return pinned;
    }

    std::unique_ptr<Fetch> fetch(const Buffer& buffer, const Buffer& slot) override {
        return std::make_unique<GpuFetch>(handle_, buffer, slot);
    }

    std::unique_ptr<RecordedGraph> capture(const std::function<void()>& work) override {
        call_plugin([&](sd35_plugin_message* message) {
            return functions().record_begin(device(), message);
        });
        try {
            work();
        } catch (...) {
            // The recording has to end before anything else is queued; its own error says less.
            functions().record_end(device(), nullptr, nullptr);
            throw;
        }
        void* graph = nullptr;
        call_plugin([&](sd35_plugin_message* message) {
            return functions().record_end(device(), &graph, message);
        });
        return std::make_unique<GpuGraph>(handle_, graph);
    }

    std::uint64_t scratch_version() const override { return functions().scratch_version(device()); }

    void synchronize() override {
        call_plugin([&](sd35_plugin_message* message) {
            return functions().synchronize(device(), message);
        });
    }

    void trim() override {
        call_plugin(
            [&](sd35_plugin_message* message) { return functions().trim(device(), message); });
    }

    DeviceMemory memory() override {
        DeviceMemory memory{};
        call_plugin([&](sd35_plugin_message* message) {
            return functions().memory(device(), &memory.used, &memory.peak, &memory.total, message);
        });
        return memory;
    }

  private:
    const sd35_plugin_device& functions() const noexcept { return handle_->functions(); }
    void* device() const noexcept { return handle_->device(); }

    Buffer pinned_buffer(const Shape& shape) {
        const std::size_t bytes = byte_count(shape, DType::float32);
        void* address = nullptr;
        call_plugin([&](sd35_plugin_message* message) {
            return functions().pin(bytes, &address, message);
        });
        const SharedHandle handle = handle_;
        const std::shared_ptr<void> owner(
            address, [handle](void* memory) { handle->functions().unpin(memory); });
        return Buffer(owner, static_cast<std::byte*>(address), DType::float32, shape);
    }

    int index_;
    SharedHandle handle_;
};

}  // namespace

std::unique_ptr<Device> open_gpu(int index) {
    return std::make_unique<GpuDevice>(load_gpu(), index);
}

}  // namespace libsd35
