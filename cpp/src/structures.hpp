// Structures of sd35.h, which begin with their size, so that a later version can add fields.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "error.hpp"

namespace libsd35 {

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
