// Prompts to token ids of the fixed lengths that the model was trained with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bundle.hpp"

struct sd35_tokenizer;

namespace libsd35 {

// One of the model's tokenizers, by Hugging Face's library. One thread at a time.
class PromptTokenizer {
  public:
    // Throws Error where the file is no tokenizer.
    PromptTokenizer(const Bundle& bundle, const TokenizerRecord& record);

    // Writes `length` token ids, special ones included, cut or padded. Returns how many tokens the
    // whole text has.
    std::int64_t encode(std::string_view text, std::int64_t length, std::int64_t* ids);

    // The same of a text with marks of weights, each part of which is cut into tokens by itself,
    // and `length` weights.
    std::int64_t encode_weighted(std::string_view text, std::int64_t length, std::int64_t* ids,
                                 float* weights);

  private:
    std::vector<std::int64_t> special_tokens();
    // Adds at most `room` tokens of a text; returns how many it has.
    std::int64_t add_tokens(std::string_view text, bool special, std::size_t room,
                            std::vector<std::int64_t>& tokens);

    struct Free {
        void operator()(sd35_tokenizer* tokenizer) const noexcept;
    };
    std::unique_ptr<sd35_tokenizer, Free> tokenizer_;
    std::int64_t pad_id_;
};

}  // namespace libsd35
