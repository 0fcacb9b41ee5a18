#include "text_features.hpp"

#include <algorithm>
#include <optional>

#include "half.hpp"
#include "token_weights.hpp"

namespace libsd35 {
namespace {

std::uint64_t bytes_of(const TextFeatures& features) {
    return features.hidden.bytes() + features.pooled.bytes();
}

std::vector<MixedText> unique_of(const std::vector<MixedText>& texts) {
    std::vector<MixedText> unique;
    for (const MixedText& text : texts) {
        if (std::find(unique.begin(), unique.end(), text) == unique.end()) unique.push_back(text);
    }
    return unique;
}

// Copies rows of values to a place among wider rows.
void put(const Buffer& rows, const Buffer& block, const Place& place) {
    // An engine that was built for one length may give others than those asked for.
    const Buffer room = block.rows(place.first_row, rows.shape()[0]);
    const auto width = static_cast<std::size_t>(place.width);
    const std::size_t from_row = width * item_bytes(rows.dtype());
    const std::size_t item = item_bytes(block.dtype());
    const std::size_t to_row = static_cast<std::size_t>(block.shape()[1]) * item;
    std::byte* to = room.address() + static_cast<std::size_t>(place.column) * item;
    const std::byte* from = rows.address();
    for (std::int64_t i = 0; i < rows.shape()[0]; ++i, from += from_row, to += to_row) {
        convert(from, rows.dtype(), to, block.dtype(), width);
    }
}

void put_vector(const Buffer& vector, const Buffer& into, std::int64_t column) {
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

TextEncoder::TextEncoder(const Bundle& bundle, Device& device, ComponentRunner& runner,
                         AdapterFeeder& feeder, std::uint64_t cache_bytes)
    : manifest_(bundle.manifest()),
      device_(device),
      runner_(runner),
      feeder_(feeder),
      cache_(cache_bytes) {
    for (const auto& [name, record] : manifest_.tokenizers) {
        tokenizers_.emplace(name, PromptTokenizer(bundle, record));
    }
}

std::vector<SharedFeatures> TextEncoder::encode(const std::vector<MixedText>& texts,
                                                std::int64_t t5_tokens,
                                                const AdapterInputs& inputs) {
    std::map<MixedText, SharedFeatures> known;
    std::vector<MixedText> missing;
    for (const MixedText& text : unique_of(texts)) {
        SharedFeatures features = cache_.get({text, t5_tokens});
        if (features == nullptr) missing.push_back(text);
        known[text] = std::move(features);
    }
    if (!missing.empty()) {
        const std::vector<SharedFeatures> computed = compute(missing, t5_tokens, inputs);
        for (std::size_t i = 0; i < missing.size(); ++i) {
            known[missing[i]] = computed[i];
            cache_.put({missing[i], t5_tokens}, computed[i], bytes_of(*computed[i]));
        }
    }
    std::vector<SharedFeatures> result;
    for (const MixedText& text : texts) result.push_back(known[text]);
    return result;
}

// SD3: CLIP-L beside CLIP-G, padded with zeros to T5's width, followed by T5. Without T5 its part
// stays zero.
std::vector<SharedFeatures> TextEncoder::compute(const std::vector<MixedText>& texts,
                                                 std::int64_t t5_tokens,
                                                 const AdapterInputs& inputs) {
    const std::int64_t clip_tokens = manifest_.tokenizers.find("clip_l")->second.length;
    const NewFeatures features =
        blank(runner_.component("conditioner"), texts.size(), clip_tokens + t5_tokens);
    const std::vector<SharedFeatures> empties = empties_of(texts, t5_tokens, inputs);
    std::int64_t column = 0;
    std::int64_t pooled_column = 0;
    for (const std::string name : {"clip_l", "clip_g", "t5"}) {
        if (manifest_.component(name) == nullptr) continue;
        const bool is_clip = name != "t5";
        const std::int64_t length = is_clip ? clip_tokens : t5_tokens;
        const Tokens tokens = tokenize(name, texts, length, features);
        const Outputs out = run(name, tokens.ids, texts, inputs);
        const Buffer hidden = device_.download(out.find("hidden")->second);
        const Place place{is_clip ? 0 : clip_tokens, is_clip ? column : 0, hidden.shape()[2]};
        for (std::size_t i = 0; i < texts.size(); ++i) {
            put(hidden.row(static_cast<std::int64_t>(i)), features[i]->hidden, place);
            if (empties[i] == nullptr) continue;
            weigh(features[i]->hidden, empties[i]->hidden, place, tokens.weights[i]);
        }
        if (!is_clip) continue;
        const Buffer pooled = device_.download(out.find("pooled")->second);
        for (std::size_t i = 0; i < texts.size(); ++i) {
            put_vector(pooled.row(static_cast<std::int64_t>(i)), features[i]->pooled,
                       pooled_column);
        }
        column += place.width;
        pooled_column += pooled.shape()[1];
    }
    return {features.begin(), features.end()};
}

// Runs a text encoder on the tokens of some texts.
Outputs TextEncoder::run(const std::string& name, const Buffer& ids,
                         const std::vector<MixedText>& texts, const AdapterInputs& inputs) {
    std::vector<Mix> mixes;
    for (const auto& [_, mix] : texts) mixes.push_back(mix);
    Feed feed = feeder_.ports(name, inputs, mixes);
    feed.emplace_back("input_ids", device_.upload(ids));
    return runner_.run(name, feed, {{"batch", ids.shape()[0]}, {"tokens", ids.shape()[1]}});
}

// Features of an empty text, with its mix, for each text that has weights; NULL for others.
std::vector<SharedFeatures> TextEncoder::empties_of(const std::vector<MixedText>& texts,
                                                    std::int64_t t5_tokens,
                                                    const AdapterInputs& inputs) {
    std::vector<SharedFeatures> empties(texts.size());
    std::vector<std::size_t> places;
    std::vector<MixedText> nothing;
    for (std::size_t i = 0; i < texts.size(); ++i) {
        if (!texts[i].first.weighted) continue;
        places.push_back(i);
        nothing.emplace_back(Prompt{}, texts[i].second);
    }
    if (nothing.empty()) return empties;
    const std::vector<SharedFeatures> own = encode(nothing, t5_tokens, inputs);
    for (std::size_t i = 0; i < places.size(); ++i) empties[places[i]] = own[i];
    return empties;
}

// Cuts texts into so many tokens; notes those that have more.
TextEncoder::Tokens TextEncoder::tokenize(const std::string& name,
                                          const std::vector<MixedText>& texts, std::int64_t length,
                                          const NewFeatures& features) {
    Tokens tokens{host_buffer(DType::int64, {static_cast<std::int64_t>(texts.size()), length}),
                  std::vector<std::vector<float>>(texts.size())};
    PromptTokenizer& tokenizer = tokenizers_.find(name)->second;
    for (std::size_t i = 0; i < texts.size(); ++i) {
        auto* const ids = tokens.ids.row(static_cast<std::int64_t>(i)).data<std::int64_t>();
        const Prompt& prompt = texts[i].first;
        const std::string& text = prompt.text_of(name);
        std::vector<float>& weights = tokens.weights[i];
        if (prompt.weighted) weights.resize(static_cast<std::size_t>(length));
        const std::int64_t whole =
            prompt.weighted ? tokenizer.encode_weighted(text, length, ids, weights.data())
                            : tokenizer.encode(text, length, ids);
        // CLIP-G has CLIP-L's vocabulary.
        if (name != "clip_g" && whole > length) {
            features[i]->notes.push_back(cut_note(name, whole, length));
        }
    }
    return tokens;
}

}  // namespace libsd35
