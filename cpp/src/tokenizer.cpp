#include "tokenizer.hpp"

#include <sd35_tokenizers.h>

#include "error.hpp"

namespace libsd35 {
namespace {

// T5's has some MB.
constexpr std::uint64_t largest_tokenizer = 64 << 20;

// Takes and frees the message of a function that failed.
std::string taken(char* message) {
    const std::string text = message == nullptr ? "no reason given" : message;
    sd35_rust_message_free(message);
    return text;
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
    if (count < 0) {
        throw bundle_error("a tokenizer of the bundle failed: " + taken(message),
                           "build the bundle again");
    }
    return count;
}

}  // namespace libsd35
