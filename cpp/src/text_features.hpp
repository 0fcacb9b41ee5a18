// Text features of prompts: what the text encoders compute, put together as SD3 reads it.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runner.hpp"
#include "tokenizer.hpp"

namespace libsd35 {

// One text's features, on the host.
struct TextFeatures {
    Buffer hidden;  // [tokens, width], in the dtype of the conditioner's prompt_embeds
    Buffer pooled;  // [pooled width], in that of its pooled
    std::vector<std::string> notes;  // what is said of the text, such as that it was cut
};

using SharedFeatures = std::shared_ptr<const TextFeatures>;

// Of texts that are being encoded.
using NewFeatures = std::vector<std::shared_ptr<TextFeatures>>;

// The features that were used last, of together no more than so many bytes.
class FeatureCache {
  public:
    // A text, and the length of T5's part.
    using Key = std::pair<std::string, std::int64_t>;

    explicit FeatureCache(std::uint64_t limit) : limit_(limit) {}

    // Counts as used; NULL where it is not held.
    SharedFeatures get(const Key& key);
    // Takes the place of those that were not used for longest.
    void put(const Key& key, SharedFeatures features);

  private:
    using Entry = std::pair<Key, SharedFeatures>;

    std::uint64_t limit_;
    std::uint64_t bytes_ = 0;
    std::list<Entry> entries_;  // the one that was used last, last
    std::map<Key, std::list<Entry>::iterator> places_;
};

// Texts to features. Those of the latest texts are kept: a repeated prompt runs no engine.
class TextEncoder {
  public:
    // Throws Error where a file is no tokenizer.
    TextEncoder(const Bundle& bundle, Device& device, ComponentRunner& runner,
                std::uint64_t cache_bytes);

    // Features of each text; those not known are computed in one batch. Throws Error.
    std::vector<SharedFeatures> encode(const std::vector<std::string>& texts,
                                       std::int64_t t5_tokens);

  private:
    std::vector<SharedFeatures> compute(const std::vector<std::string>& texts,
                                        std::int64_t t5_tokens);
    Outputs run(const std::string& name, const std::vector<std::string>& texts, std::int64_t length,
                const NewFeatures& features);

    const Manifest& manifest_;
    Device& device_;
    ComponentRunner& runner_;
    FeatureCache cache_;
    std::map<std::string, PromptTokenizer, std::less<>> tokenizers_;
};

}  // namespace libsd35
