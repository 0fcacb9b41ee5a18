// Pictures that clients send, as libsd35 takes them.
#pragma once

#include <optional>
#include <sd35/sd35.hpp>
#include <string>
#include <string_view>

#include "png.hpp"

namespace server {

// A request that cannot be understood.
class BadRequest : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// A PNG file; `field` is where it was sent. Throw BadRequest.
Rgba upload_of(std::string_view file, const std::string& field);

// The same in base64, which a data: URL may have around it.
Rgba upload_of_text(std::string_view text, const std::string& field);

// What is transparent, on white.
sd35::Picture picture_of(const Rgba& upload);

// What is drawn anew, as OpenAI has it: where the picture is transparent; where none of it can be,
// where it is light.
sd35::Mask mask_of(const Rgba& upload);

// Whether anything of it is transparent.
bool is_clear(const Rgba& upload);

}  // namespace server
