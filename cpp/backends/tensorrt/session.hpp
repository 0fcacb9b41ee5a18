// One plan of TensorRT, on the device's stream and working memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "library.hpp"
#include "plugin/interface.h"

namespace libsd35::trt {

// Working memory is the device's scratch memory, sized for the shapes at hand: engines run one
// after another and share it.
class PlanSession {
  public:
    // Throws Failure.
    explicit PlanSession(const sd35_plugin_engine& engine);

    // Throws Failure.
    void run(const sd35_plugin_tensor* inputs, std::size_t input_count,
             const sd35_plugin_tensor* outputs, std::size_t output_count);

  private:
    using Shapes = std::vector<std::vector<std::int64_t>>;

    void limit_weights(const sd35_plugin_engine& engine);
    void set_shapes(const sd35_plugin_tensor* inputs, std::size_t count);
    void set_address(const sd35_plugin_tensor& tensor);
    [[noreturn]] void fail(const std::string& reason) const;

    const Library& library_;
    std::string component_;
    sd35_plugin_place place_;
    Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    Shapes shapes_;
    std::uint64_t scratch_bytes_ = 0;
};

}  // namespace libsd35::trt
