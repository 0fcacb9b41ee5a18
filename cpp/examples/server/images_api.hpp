// POST /v1/images/generations, in OpenAI's form: what a client sends, and what it gets.
#pragma once

#include <exception>
#include <nlohmann/json.hpp>
#include <sd35/sd35.hpp>
#include <string>
#include <string_view>

namespace server {

// A request that cannot be understood.
class BadRequest : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// What a body asks for: prompt, n, size ("1024x1024" or "auto") and response_format ("b64_json") as
// OpenAI has them; besides negative_prompt, seed, steps, guidance, shift, sampler and t5_tokens.
// Throws BadRequest; names the field.
sd35::Request read_request(std::string_view body);

// The pictures, as PNG in base64.
nlohmann::json response_of(const sd35::Result& result);

// {"error": {"message": ..., "type": ..., "code": ...}}
nlohmann::json error_of(std::string_view message, std::string_view type, int status);

}  // namespace server
