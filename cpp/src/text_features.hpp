// Text features of prompts: what the text encoders compute, put together as SD3 reads it.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "adapters.hpp"
#include "byte_cache.hpp"
#include "prompts.hpp"
#include "runner.hpp"
#include "tokenizer.hpp"

namespace libsd35 {

// A prompt, and what the text encoders have of adapters for it.
using MixedText = std::pair<Prompt, Mix>;

// One text's features, on the host.
struct TextFeatures {
    Buffer hidden;  // [tokens, width], in the dtype of the conditioner's prompt_embeds
    Buffer pooled;  // [pooled width], in that of its pooled
    std::vector<std::string> notes;  // what is said of the text, such as that it was cut
};

using SharedFeatures = std::shared_ptr<const TextFeatures>;

// Of texts that are being encoded.
using NewFeatures = std::vector<std::shared_ptr<TextFeatures>>;

// Texts to features. Those of the latest texts are kept: a repeated prompt runs no engine.
class TextEncoder {
  public:
    // Throws Error where a file is no tokenizer.
    TextEncoder(const Bundle& bundle, Device& device, ComponentRunner& runner,
                AdapterFeeder& feeder, std::uint64_t cache_bytes);

    // Features of each text; those not known are computed in one batch. Throws Error.
    //
    // `inputs` are the run's for adapters, of which each text has a mix.
    std::vector<SharedFeatures> encode(const std::vector<MixedText>& texts, std::int64_t t5_tokens,
                                       const AdapterInputs& inputs);

  private:
    // What a text encoder reads of some texts.
    struct Tokens {
        Buffer ids;                               // int64 [texts, length]
        std::vector<std::vector<float>> weights;  // of each text's tokens; none without marks
    };

    std::vector<SharedFeatures> compute(const std::vector<MixedText>& texts, std::int64_t t5_tokens,
                                        const AdapterInputs& inputs);
    std::vector<SharedFeatures> empties_of(const std::vector<MixedText>& texts,
                                           std::int64_t t5_tokens, const AdapterInputs& inputs);
    Outputs run(const std::string& name, const Buffer& ids, const std::vector<MixedText>& texts,
                const AdapterInputs& inputs);
    Tokens tokenize(const std::string& name, const std::vector<MixedText>& texts,
                    std::int64_t length, const NewFeatures& features);

    const Manifest& manifest_;
    Device& device_;
    ComponentRunner& runner_;
    AdapterFeeder& feeder_;
    ByteCache<std::pair<MixedText, std::int64_t>, TextFeatures> cache_;  // by T5's tokens, too
    std::map<std::string, PromptTokenizer, std::less<>> tokenizers_;
};

}  // namespace libsd35
