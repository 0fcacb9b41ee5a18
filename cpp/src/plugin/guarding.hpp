// The boundary of a plug-in: no exception leaves, its message does.
#pragma once

#include <algorithm>
#include <cstring>
#include <string_view>

#include "plugin/interface.h"

namespace libsd35 {

inline void write_message(sd35_plugin_message* message, std::string_view text) noexcept {
    if (message == nullptr || message->capacity == 0) return;
    const std::size_t length = std::min(text.size(), message->capacity - 1);
    std::memcpy(message->text, text.data(), length);
    message->text[length] = '\0';
}

}  // namespace libsd35
