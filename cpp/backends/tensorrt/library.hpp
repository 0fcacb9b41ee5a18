// TensorRT's library, opened when the first engine is.
#pragma once

#include <NvInferRuntime.h>

#include <mutex>
#include <string>
#include <vector>

namespace libsd35::trt {

// Keeps what the library says of its errors.
class Log final : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char* message) noexcept override;

    // In one line, each reason once.
    std::string reasons() const;

  private:
    mutable std::mutex mutex_;
    std::vector<std::string> errors_;
};

class Library {
  public:
    // Opens it at the first call; it stays until the process ends. Throws Failure where it is
    // missing, or of another version than the headers that this was built with.
    static const Library& instance();

    const std::string& version() const noexcept { return version_; }

    // Throws Failure.
    nvinfer1::IRuntime* create_runtime(Log& log) const;

  private:
    Library();

    using Create = void* (*)(void* logger, std::int32_t version);

    std::string version_;
    Create create_ = nullptr;
};

}  // namespace libsd35::trt
