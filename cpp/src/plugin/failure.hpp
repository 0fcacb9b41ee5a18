// Failures inside a plug-in, and the boundary that they do not cross.
#pragma once

#include <sd35/sd35.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "plugin/interface.h"

namespace libsd35 {

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

// Whether a library's error says that there is no memory. They say so in words alone: ONNX
// Runtime's allocators, CUDA, cuBLAS.
inline bool lacks_memory(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    for (const char* words : {"failed to allocate memory", "out of memory", "alloc_failed"}) {
        if (text.find(words) != std::string::npos) return true;
    }
    return false;
}

// Of an engine that fails while it runs.
inline Failure engine_failure(const std::string& component, const std::string& library,
                              const std::string& reason) {
    const std::string what = component + " failed in " + library + ": " + reason;
    if (lacks_memory(reason)) {
        return Failure(SD35_OUT_OF_MEMORY, what + " — try a smaller size or batch");
    }
    return Failure(SD35_FAILED, what +
                                    " — check the bundle: sd35-trt verify BUNDLE, and this "
                                    "machine: sd35-trt doctor");
}

inline void write_message(sd35_plugin_message* message, std::string_view text) noexcept {
    if (message == nullptr || message->capacity == 0) return;
    const std::size_t length = std::min(text.size(), message->capacity - 1);
    std::memcpy(message->text, text.data(), length);
    message->text[length] = '\0';
}

// Calls something that may throw.
template <typename Work>
int guarded(sd35_plugin_message* message, const Work& work) noexcept {
    try {
        work();
        return SD35_OK;
    } catch (const Failure& failure) {
        write_message(message, failure.what());
        return failure.status();
    } catch (const std::bad_alloc&) {
        write_message(message, "the host has no memory left — draw a smaller size or batch");
        return SD35_OUT_OF_MEMORY;
    } catch (const std::exception& error) {
        write_message(message, error.what());
        return SD35_FAILED;
    }
}

}  // namespace libsd35
