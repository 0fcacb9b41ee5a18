// One ONNX component, with inputs and outputs bound to the caller's buffers.
#pragma once

#include <string>

#include "library.hpp"
#include "plugin/interface.h"

namespace libsd35::onnx {

class OnnxSession {
  public:
    // Throws Failure, Ort::Exception.
    explicit OnnxSession(const sd35_plugin_engine& engine);

    // Throws Failure.
    void run(const sd35_plugin_tensor* inputs, std::size_t input_count,
             const sd35_plugin_tensor* outputs, std::size_t output_count);

  private:
    Ort::Value value_of(const sd35_plugin_tensor& tensor) const;

    Library& library_;
    std::string component_;
    Ort::MemoryInfo memory_;
    Ort::RunOptions run_options_;
    Ort::Session session_;
};

}  // namespace libsd35::onnx
