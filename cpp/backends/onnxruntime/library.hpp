// ONNX Runtime's library, opened when the first engine is.
#pragma once

#include <string>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace libsd35::onnx {

// The library, and what all sessions have in common. It stays until the process ends.
class Library {
  public:
    // Opens it at the first call. Throws Failure where it is missing or too old.
    static Library& instance();

    Ort::Env& env() { return env_; }
    const std::string& version() const noexcept { return version_; }

  private:
    explicit Library(std::string version);

    std::string version_;
    Ort::Env env_;
};

}  // namespace libsd35::onnx
