// JSON text as clients send it.
#pragma once

#include <string>
#include <string_view>

namespace server {

// With escapes of lone surrogates, as a text has that was cut within a character, as U+FFFD.
std::string without_lone_surrogates(std::string_view json);

}  // namespace server
