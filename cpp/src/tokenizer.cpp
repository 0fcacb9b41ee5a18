#include "tokenizer.hpp"

#include <sd35_tokenizers.h>

#include <algorithm>

#include "error.hpp"
#include "token_weights.hpp"

namespace libsd35 {
namespace {

// T5's has some MB.
constexpr std::uint64_t largest_tokenizer = 64 << 20;

// CLIP puts one token before a text and one behind it.
constexpr std::size_t most_special = 64;

// Takes and frees the message of a function that failed.
std::string taken(char* message) {
    const std::string text = message == nullptr ? "no reason given" : message;
    sd35_rust_message_free(message);
    return text;
}

// A count of tokens, or why there is none.
std::int64_t checked(std::int64_t count, char* message) {
    if (count >= 0) return count;
    throw bundle_error("a tokenizer of the bundle failed: " + taken(message),
                       "build the bundle again");
}

const std::uint8_t* bytes_of(std::string_view text) {
    return reinterpret_cast<const std::uint8_t*>(text.data());
}

}  // namespace

PromptTokenizer::PromptTokenizer(const Bundle& bundle, const TokenizerRecord& record)
    : pad_id_(record.pad_id) {
    const std::string json = bundle.read(record.path, largest_tokenizer);
    char* message = nullptr;
    tokenizer_.reset(sd35_tokenizer_open(bytes_of(json), json.size(), &message));
    if (tokenizer_ == nullptr) {
        throw bundle_error(
            bundle.path(record.path).string() + " is no tokenizer: " + taken(message),
            "build the bundle again");
    }
}

void PromptTokenizer::Free::operator()(sd35_tokenizer* tokenizer) const noexcept {
    sd35_tokenizer_free(tokenizer);
}

std::int64_t PromptTokenizer::encode(std::string_view text, std::int64_t length,
                                     std::int64_t* ids) {
    char* message = nullptr;
    const std::int64_t count =
        sd35_tokenizer_encode(tokenizer_.get(), bytes_of(text), text.size(),
                              static_cast<std::size_t>(length), pad_id_, ids, &message);
    return checked(count, message);
}

std::int64_t PromptTokenizer::add_tokens(std::string_view text, bool special, std::size_t room,
                                         std::vector<std::int64_t>& tokens) {
    const std::size_t before = tokens.size();
    tokens.resize(before + room);
    char* message = nullptr;
    const std::int64_t count =
        sd35_tokenizer_tokens(tokenizer_.get(), bytes_of(text), text.size(), special, room,
                              tokens.data() + before, &message);
    tokens.resize(before + std::min(room, static_cast<std::size_t>(checked(count, message))));
    return count;
}

// Those around an empty text, the last of which ends it.
std::vector<std::int64_t> PromptTokenizer::special_tokens() {
    std::vector<std::int64_t> tokens;
    add_tokens("", true, most_special, tokens);
    if (tokens.empty()) {
        throw bundle_error(
            "a tokenizer of the bundle ends no text, so that it has none with weights",
            "build the bundle again");
    }
    return tokens;
}

std::int64_t PromptTokenizer::encode_weighted(std::string_view text, std::int64_t length,
                                              std::int64_t* ids, float* weights) {
    const auto room = static_cast<std::size_t>(length);
    const std::vector<std::int64_t> special = special_tokens();
    std::vector<std::int64_t> tokens(special.begin(), special.end() - 1);
    std::vector<float> own(tokens.size(), 1.0F);
    const std::size_t most = std::max(room, special.size()) - 1;
    auto count = static_cast<std::int64_t>(special.size());
    for (const WeightedPart& part : weighted_parts(text)) {
        count += add_tokens(part.text, false, most - tokens.size(), tokens);
        own.resize(tokens.size(), static_cast<float>(part.weight));
    }
    tokens.push_back(special.back());
    own.push_back(1.0F);
    tokens.resize(room, pad_id_);
    own.resize(room, 1.0F);
    std::copy(tokens.begin(), tokens.end(), ids);
    std::copy(own.begin(), own.end(), weights);
    return count;
}

}  // namespace libsd35
