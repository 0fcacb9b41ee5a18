// SHA-256, in lower-case hex digits.
#pragma once

#include <memory>
#include <string>
#include <string_view>

struct sd35_sha256;

namespace libsd35 {

class Sha256 {
  public:
    Sha256();

    void update(std::string_view data);
    // Of what came so far.
    std::string digest() const;

  private:
    struct Free {
        void operator()(sd35_sha256* state) const noexcept;
    };
    std::unique_ptr<sd35_sha256, Free> state_;
};

std::string sha256(std::string_view data);

}  // namespace libsd35
