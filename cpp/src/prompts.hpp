// What the text encoders read of an image: one text for all, or one each.
#pragma once

#include <sd35/sd35.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace libsd35 {

// A prompt, or a negative one: a text for each encoder.
struct Prompt {
    std::string clip_l;
    std::string clip_g;
    std::string t5;
    bool weighted = false;  // whether marks of weights are read

    bool empty() const { return clip_l.empty() && clip_g.empty() && t5.empty(); }
    // The text of a text encoder, by its component's name.
    const std::string& text_of(std::string_view encoder) const;
};

bool operator==(const Prompt& one, const Prompt& other);
bool operator<(const Prompt& one, const Prompt& other);

// Texts of a caller's.
struct GivenTexts {
    const sd35_text* values;
    std::size_t count;
};

// Prompts from an argument and those that differ from it for CLIP-G and for T5, whose names end in
// _2 and _3. One text stands for all; none of the latter two takes the first. Throws Error.
std::vector<Prompt> make_prompts(const std::string& name, const std::array<GivenTexts, 3>& given,
                                 bool weighted, std::uint32_t limit);

}  // namespace libsd35
