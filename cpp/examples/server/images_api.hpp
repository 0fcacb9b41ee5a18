// POST /v1/images/generations and /v1/images/edits, in OpenAI's form: what a client sends, and what
// it gets.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <sd35/sd35.hpp>
#include <string>
#include <string_view>

#include "uploads.hpp"

namespace server {

// A form: the values of its fields, and the bytes of its files.
struct Form {
    std::map<std::string, std::string> fields;
    std::map<std::string, std::string> files;
};

// What a body of JSON asks for: prompt, n, size ("1024x1024" or "auto") and response_format
// ("b64_json") as OpenAI has them; besides negative_prompt, what each encoder reads (prompt_2,
// prompt_3, negative_prompt_2, negative_prompt_3), weighting, seed, steps, guidance, shift,
// sampler, t5_tokens, skip-layer guidance, adapters by name and control: pictures by the net's
// name. Throws BadRequest; names the field.
sd35::Request read_request(std::string_view body);

// What the form of an edit asks for: the files image and mask, and the same fields, of which those
// that are no text are as in JSON; besides strength and paste. `masks` says whether the bundle
// takes masks. Throws BadRequest.
sd35::Request read_edit(const Form& form, bool masks);

// The pictures, as PNG in base64.
nlohmann::json response_of(const sd35::Result& result);

// A name that a client gave, in a message.
std::string quoted(const std::string& name);

// {"error": {"message": ..., "type": ..., "code": ...}}
nlohmann::json error_of(std::string_view message, std::string_view type, int status);

}  // namespace server
