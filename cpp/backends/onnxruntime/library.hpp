// ONNX Runtime's library, opened when the first engine is.
#pragma once

#include <string>

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

namespace libsd35::onnx {

// A failure with its status of sd35.h; the message names the fix.
class Failure : public std::exception {
  public:
    Failure(int status, std::string message) : status_(status), message_(std::move(message)) {}

    int status() const noexcept { return status_; }
    const char* what() const noexcept override { return message_.c_str(); }

  private:
    int status_;
    std::string message_;
};

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
