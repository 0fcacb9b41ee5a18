// What the user should know of a request that was drawn.
#pragma once

#include <string>
#include <vector>

#include "request.hpp"
#include "text_features.hpp"

namespace libsd35 {

// Features of a request's texts, one for each image.
struct TextBranches {
    const SharedFeatures* negatives;  // NULL where the bundle is not guided
    const SharedFeatures* prompts;
};

// Notes on a request's texts and guidance, each once.
std::vector<std::string> notes_of(const Request& request, const TextBranches& branches);

}  // namespace libsd35
