// The CPU as a device: buffers are the host's, and nothing is queued.
#pragma once

#include "device.hpp"

namespace libsd35 {

class CpuDevice final : public Device {
  public:
    std::string name() const override { return "cpu"; }
    sd35_plugin_place place() override { return {}; }
    bool is_gpu() const override { return false; }
    bool queues() const override { return false; }
    void activate() override {}
    Buffer empty(DType dtype, Shape shape) override;
    Buffer upload(const Buffer& array) override { return array; }
    void copy(const Buffer& source, const Buffer& target) override;
    Buffer download(const Buffer& buffer) override { return buffer; }
    std::vector<Buffer> slots(const Shape& shape, std::size_t count) override;
    std::unique_ptr<Fetch> fetch(const Buffer& buffer, const Buffer& slot) override;
    std::unique_ptr<RecordedGraph> capture(const std::function<void()>& work) override;
    std::uint64_t scratch_version() const override { return 0; }
    void synchronize() override {}
    void trim() override {}
    DeviceMemory memory() override;
};

}  // namespace libsd35
