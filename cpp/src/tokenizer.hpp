// Prompts to token ids of the fixed lengths that the model was trained with.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

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

  private:
    struct Free {
        void operator()(sd35_tokenizer* tokenizer) const noexcept;
    };
    std::unique_ptr<sd35_tokenizer, Free> tokenizer_;
    std::int64_t pad_id_;
};

}  // namespace libsd35
