#include "sha256.hpp"

#include <sd35_tokenizers.h>

#include <array>

#include "text.hpp"

namespace libsd35 {

Sha256::Sha256() : state_(sd35_sha256_new()) {}

void Sha256::Free::operator()(sd35_sha256* state) const noexcept {
    sd35_sha256_free(state);
}

void Sha256::update(std::string_view data) {
    sd35_sha256_update(state_.get(), reinterpret_cast<const std::uint8_t*>(data.data()),
                       data.size());
}

std::string Sha256::digest() const {
    std::array<std::uint8_t, 32> bytes;
    sd35_sha256_digest(state_.get(), bytes.data());
    return hex(bytes.data(), bytes.size());
}

std::string sha256(std::string_view data) {
    Sha256 state;
    state.update(data);
    return state.digest();
}

}  // namespace libsd35
