// What the handles of sd35.h are, and what every function of it does: no exception leaves.
#pragma once

#include <sd35/sd35.h>

#include <memory>
#include <string>

#include "error.hpp"
#include "job.hpp"
#include "pipeline.hpp"
#include "structures.hpp"

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

struct sd35_array {
    libsd35::Buffer values;
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

}  // namespace libsd35
