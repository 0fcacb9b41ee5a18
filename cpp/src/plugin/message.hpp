// Calling a function of a plug-in that writes why it failed.
#pragma once

#include <array>
#include <string>

#include "error.hpp"
#include "plugin/interface.h"

namespace libsd35 {

// Calls something that takes a place for a message and returns a status. Throws Error.
template <typename Call>
void call_plugin(const Call& call) {
    std::array<char, 4096> text{};
    sd35_plugin_message message{text.data(), text.size()};
    const int status = call(&message);
    if (status != SD35_OK) throw backend_error(status, text.data());
}

}  // namespace libsd35
