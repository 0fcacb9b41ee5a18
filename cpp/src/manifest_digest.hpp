// Whether a manifest is as it was written.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace libsd35 {

// Compares the digest: that in bundle.json.sha256, or of format 1 that in the document.
//
// Throws Error where the digest's file is missing or cannot be read.
bool manifest_is_whole(std::string_view data, const nlohmann::json& document,
                       const std::filesystem::path& root);

}  // namespace libsd35
