#include "session.hpp"

#include <algorithm>

#include "mapped_file.hpp"
#include "plugin/failure.hpp"
#include "text.hpp"

namespace libsd35::trt {
namespace {

std::string device_name(const sd35_plugin_place& place) {
    return "cuda:" + std::to_string(place.index);
}

nvinfer1::Dims dims_of(const sd35_plugin_tensor& tensor) {
    nvinfer1::Dims dims{};
    dims.nbDims = tensor.rank;
    std::copy_n(tensor.shape, tensor.rank, dims.d);
    return dims;
}

}  // namespace

PlanSession::PlanSession(const sd35_plugin_engine& engine)
    : library_(Library::instance()),
      component_(engine.component),
      place_(engine.place),
      runtime_(library_.create_runtime(log_)) {
    const MappedFile plan(engine.path);
    if (plan.size() != 0) {
        engine_.reset(runtime_->deserializeCudaEngine(plan.data(), plan.size()));
    }
    if (engine_ == nullptr && lacks_memory(log_.reasons())) {
        throw Failure(SD35_OUT_OF_MEMORY, device_name(place_) + " has no room for " + component_ +
                                              " — load with a vram_budget");
    }
    if (engine_ == nullptr) {
        throw Failure(SD35_BUNDLE, std::string(engine.path) + " is built for " + engine.built_for +
                                       "; TensorRT " + library_.version() +
                                       " refuses it: " + log_.reasons() +
                                       " — build for this GPU with: sd35-trt build --gpu auto");
    }
    limit_weights(engine);
    context_.reset(engine_->createExecutionContext(
        nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (context_ == nullptr) {
        throw Failure(SD35_OUT_OF_MEMORY, "TensorRT cannot prepare " + component_ + ": " +
                                              log_.reasons() + " — load with a vram_budget");
    }
}

// Keeps so many bytes of weights on the device, or all.
void PlanSession::limit_weights(const sd35_plugin_engine& engine) {
    const std::int64_t streamable = engine_->getStreamableWeightsSize();
    if (streamable == 0) return;  // built without
    std::int64_t held = streamable;
    if (engine.streams != 0) {
        const std::int64_t passing = engine_->getWeightStreamingScratchMemorySize();
        held = std::clamp<std::int64_t>(static_cast<std::int64_t>(engine.held_bytes) - passing, 0,
                                        streamable);
    }
    engine_->setWeightStreamingBudgetV2(held);
}

void PlanSession::run(const sd35_plugin_tensor* inputs, std::size_t input_count,
                      const sd35_plugin_tensor* outputs, std::size_t output_count) {
    set_shapes(inputs, input_count);
    if (scratch_bytes_ != 0) {
        void* scratch = place_.scratch(place_.device, scratch_bytes_);
        if (scratch == nullptr) {
            throw Failure(SD35_OUT_OF_MEMORY,
                          device_name(place_) + " has no room for what " + component_ +
                              " works with — draw a smaller size or batch, or load with a "
                              "vram_budget");
        }
        context_->setDeviceMemoryV2(scratch, static_cast<std::int64_t>(scratch_bytes_));
    }
    std::for_each(inputs, inputs + input_count, [this](const auto& one) { set_address(one); });
    std::for_each(outputs, outputs + output_count, [this](const auto& one) { set_address(one); });
    if (!context_->enqueueV3(static_cast<cudaStream_t>(place_.stream))) fail(log_.reasons());
}

void PlanSession::set_shapes(const sd35_plugin_tensor* inputs, std::size_t count) {
    Shapes shapes;
    for (std::size_t i = 0; i < count; ++i) {
        shapes.emplace_back(inputs[i].shape, inputs[i].shape + inputs[i].rank);
    }
    if (shapes == shapes_) return;
    for (std::size_t i = 0; i < count; ++i) {
        if (!context_->setInputShape(inputs[i].name, dims_of(inputs[i]))) {
            fail("it refuses the shape of " + std::string(inputs[i].name) + ": " + log_.reasons());
        }
    }
    scratch_bytes_ = context_->updateDeviceMemorySizeForShapes();
    shapes_ = std::move(shapes);
}

void PlanSession::set_address(const sd35_plugin_tensor& tensor) {
    if (!context_->setTensorAddress(tensor.name, tensor.address)) {
        fail("it has no " + std::string(tensor.name) + ": " + log_.reasons());
    }
}

void PlanSession::fail(const std::string& reason) const {
    throw engine_failure(component_, "TensorRT", reason);
}

}  // namespace libsd35::trt
