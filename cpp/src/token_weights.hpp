// Weights of a prompt's parts, as ComfyUI writes and reads them: (text:1.3) gives a part a weight,
// (text) 1.1 times that around it; \( and \) are parentheses.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "buffer.hpp"

namespace libsd35 {

struct WeightedPart {
    std::string text;
    double weight;
};

// Parts of a text in order, without the marks. Throws Error: a weight beyond 100, or parentheses
// nested too deep.
std::vector<WeightedPart> weighted_parts(std::string_view text);

// Where a text encoder's features lie in those of a text.
struct Place {
    std::int64_t first_row;
    std::int64_t column;
    std::int64_t width;
};

// Makes features z of each token (z - z_empty) * weight + z_empty; what has the weight 1 stays as
// it is, to the bit. Both are [tokens, width] of the host and of one type, float16 or float32.
void weigh(const Buffer& hidden, const Buffer& empty, const Place& place,
           const std::vector<float>& weights);

}  // namespace libsd35
