// JSON as Python's json.dumps(value, sort_keys=True) writes it.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace libsd35 {

std::string python_json(const nlohmann::json& value);

}  // namespace libsd35
