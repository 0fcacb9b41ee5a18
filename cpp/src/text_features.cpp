#include "text_features.hpp"

#include <algorithm>
#include <optional>

#include "half.hpp"

namespace libsd35 {
namespace {

std::uint64_t bytes_of(const TextFeatures& features) {
    return features.hidden.bytes() + features.pooled.bytes();
}

std::vector<std::string> unique_of(const std::vector<std::string>& texts) {
    std::vector<std::string> unique;
    for (const std::string& text : texts) {
        if (std::find(unique.begin(), unique.end(), text) == unique.end()) unique.push_back(text);
    }
    return unique;
}

// Copies rows of values into a block of wider rows, from a column on.
void place(const Buffer& rows, const Buffer& block, std::int64_t first_row, std::int64_t column) {
    // An engine that was built for one length may give others than those asked for.
    const Buffer room = block.rows(first_row, rows.shape()[0]);
    const auto width = static_cast<std::size_t>(rows.shape()[1]);
    const std::size_t from_row = width * item_bytes(rows.dtype());
    const std::size_t item = item_bytes(block.dtype());
    const std::size_t to_row = static_cast<std::size_t>(block.shape()[1]) * item;
    std::byte* to = room.address() + static_cast<std::size_t>(column) * item;
    const std::byte* from = rows.address();
    for (std::int64_t i = 0; i < rows.shape()[0]; ++i, from += from_row, to += to_row) {
        convert(from, rows.dtype(), to, block.dtype(), width);
    }
}

void place_vector(const Buffer& vector, const Buffer& into, std::int64_t column) {
    convert(vector.address(), vector.dtype(),
            into.address() + static_cast<std::size_t>(column) * item_bytes(into.dtype()),
            into.dtype(), static_cast<std::size_t>(vector.shape()[0]));
}

std::string cut_note(const std::string& encoder, std::int64_t count, std::int64_t length) {
    return "has " + std::to_string(count) + " " + encoder + " tokens, the model reads " +
           std::to_string(length) + "; the rest is ignored";
}

// Empty features of so many texts.
NewFeatures blank(const Component& conditioner, std::size_t count, std::int64_t tokens) {
    const Port& embeds = *conditioner.input("prompt_embeds");
    const Port& pooled = *conditioner.input("pooled");
    const Dims dims{{"samples", 1}, {"tokens", tokens}};
    NewFeatures features;
    for (std::size_t i = 0; i < count; ++i) {
        features.push_back(std::make_shared<TextFeatures>(
            TextFeatures{host_zeros(embeds.dtype, embeds.resolve(dims)).row(0),
                         host_zeros(pooled.dtype, pooled.resolve(dims)).row(0),
                         {}}));
    }
    return features;
}

}  // namespace

SharedFeatures FeatureCache::get(const Key& key) {
    const auto found = places_.find(key);
    if (found == places_.end()) return nullptr;
    entries_.splice(entries_.end(), entries_, found->second);
    return found->second->second;
}

void FeatureCache::put(const Key& key, SharedFeatures features) {
    if (const auto old = places_.find(key); old != places_.end()) {
        bytes_ -= bytes_of(*old->second->second);
        entries_.erase(old->second);
        places_.erase(old);
    }
    bytes_ += bytes_of(*features);
    places_[key] = entries_.emplace(entries_.end(), key, std::move(features));
    while (bytes_ > limit_) {
        bytes_ -= bytes_of(*entries_.front().second);
        places_.erase(entries_.front().first);
        entries_.pop_front();
    }
}

TextEncoder::TextEncoder(const Bundle& bundle, Device& device, ComponentRunner& runner,
                         std::uint64_t cache_bytes)
    : manifest_(bundle.manifest()), device_(device), runner_(runner), cache_(cache_bytes) {
    for (const auto& [name, record] : manifest_.tokenizers) {
        tokenizers_.emplace(name, PromptTokenizer(bundle, record));
    }
}

std::vector<SharedFeatures> TextEncoder::encode(const std::vector<std::string>& texts,
                                                std::int64_t t5_tokens) {
    std::map<std::string, SharedFeatures> known;
    std::vector<std::string> missing;
    for (const std::string& text : unique_of(texts)) {
        SharedFeatures features = cache_.get({text, t5_tokens});
        if (features == nullptr) missing.push_back(text);
        known[text] = std::move(features);
    }
    if (!missing.empty()) {
        const std::vector<SharedFeatures> computed = compute(missing, t5_tokens);
        for (std::size_t i = 0; i < missing.size(); ++i) {
            known[missing[i]] = computed[i];
            cache_.put({missing[i], t5_tokens}, computed[i]);
        }
    }
    std::vector<SharedFeatures> result;
    for (const std::string& text : texts) result.push_back(known[text]);
    return result;
}

// SD3: CLIP-L beside CLIP-G, padded with zeros to T5's width, followed by T5. Without T5 its part
// stays zero.
std::vector<SharedFeatures> TextEncoder::compute(const std::vector<std::string>& texts,
                                                 std::int64_t t5_tokens) {
    const std::int64_t clip_tokens = manifest_.tokenizers.find("clip_l")->second.length;
    const NewFeatures features =
        blank(runner_.component("conditioner"), texts.size(), clip_tokens + t5_tokens);
    std::int64_t column = 0;
    std::int64_t pooled_column = 0;
    for (const std::string name : {"clip_l", "clip_g"}) {
        const Outputs out = run(name, texts, clip_tokens, features);
        const Buffer hidden = device_.download(out.find("hidden")->second);
        const Buffer pooled = device_.download(out.find("pooled")->second);
        for (std::size_t i = 0; i < texts.size(); ++i) {
            const auto row = static_cast<std::int64_t>(i);
            place(hidden.row(row), features[i]->hidden, 0, column);
            place_vector(pooled.row(row), features[i]->pooled, pooled_column);
        }
        column += hidden.shape()[2];
        pooled_column += pooled.shape()[1];
    }
    if (manifest_.component("t5") != nullptr) {
        const Outputs out = run("t5", texts, t5_tokens, features);
        const Buffer hidden = device_.download(out.find("hidden")->second);
        for (std::size_t i = 0; i < texts.size(); ++i) {
            place(hidden.row(static_cast<std::int64_t>(i)), features[i]->hidden, clip_tokens, 0);
        }
    }
    return {features.begin(), features.end()};
}

// Runs a text encoder on texts of so many tokens; notes those that are cut.
Outputs TextEncoder::run(const std::string& name, const std::vector<std::string>& texts,
                         std::int64_t length, const NewFeatures& features) {
    const auto count = static_cast<std::int64_t>(texts.size());
    PromptTokenizer& tokenizer = tokenizers_.find(name)->second;
    const Buffer ids = host_buffer(DType::int64, {count, length});
    for (std::size_t i = 0; i < texts.size(); ++i) {
        auto* const row = ids.row(static_cast<std::int64_t>(i)).data<std::int64_t>();
        const std::int64_t whole = tokenizer.encode(texts[i], length, row);
        // CLIP-G has CLIP-L's vocabulary.
        if (name != "clip_g" && whole > length) {
            features[i]->notes.push_back(cut_note(name, whole, length));
        }
    }
    return runner_.run(name, {{"input_ids", device_.upload(ids)}},
                       {{"batch", count}, {"tokens", length}});
}

}  // namespace libsd35
