// What the handles of sd35.h are, and what every function of it does: no exception leaves.
#pragma once

#include <sd35/sd35.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "error.hpp"
#include "job.hpp"
#include "pipeline.hpp"

struct sd35_error {
    libsd35::Error error;
};

struct sd35_pipeline {
    sd35_pipeline(const char* path, const sd35_load_options& options) : pipeline(path, options) {}

    libsd35::Pipeline pipeline;
};

struct sd35_result {
    libsd35::Result result;
};

struct sd35_memory {
    libsd35::MemoryReport report;
};

namespace libsd35 {

// Puts an error where the caller wants it, if it does.
inline sd35_status tell(sd35_error** into, const Error& error) noexcept {
    if (into != nullptr) {
        try {
            *into = std::make_unique<sd35_error>(sd35_error{error}).release();
        } catch (const std::bad_alloc&) {
            *into = nullptr;  // for which sd35_error_message has words
        }
    }
    return error.status();
}

// Calls something that may throw.
template <typename Work>
sd35_status guarded(sd35_error** error, const Work& work) noexcept {
    try {
        work();
        return SD35_OK;
    } catch (...) {
        return tell(error, current_error());
    }
}

inline void require(const void* pointer, const char* name) {
    if (pointer == nullptr) throw usage_error(std::string(name) + " is NULL");
}

// A structure of the caller's, which may be of an older or newer version: of what both know, its
// values, of the rest the usual ones.
template <typename T>
T with_usual_values(const T* given, void (*init)(T*), const char* name) {
    T own;
    init(&own);
    if (given == nullptr) return own;
    if (given->size < sizeof given->size) {
        throw usage_error(std::string(name) + "->size is not set", "call its _init function first");
    }
    std::memcpy(&own, given, std::min(given->size, sizeof own));
    own.size = sizeof own;
    return own;
}

// Fills a structure of the caller's as far as it has room.
template <typename T>
void give(T* into, T own, const char* name) {
    require(into, name);
    const std::size_t size = into->size;
    if (size < sizeof size) {
        throw usage_error(std::string(name) + "->size is not set",
                          "set it to the structure's size");
    }
    own.size = size;
    std::memcpy(into, &own, std::min(size, sizeof own));
}

}  // namespace libsd35
