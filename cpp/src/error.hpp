// Errors a user can cause: one line, what, where, and what to do about it.
#pragma once

#include <sd35/sd35.h>

#include <exception>
#include <string>
#include <string_view>

namespace libsd35 {

class Error : public std::exception {
  public:
    // `fix` is what the user can do about it; it follows after a dash.
    Error(sd35_status status, std::string_view message, std::string_view fix = {});

    sd35_status status() const noexcept { return status_; }
    const std::string& message() const noexcept { return message_; }
    const char* what() const noexcept override { return message_.c_str(); }

  private:
    sd35_status status_;
    std::string message_;
};

// An argument outside what the bundle accepts.
Error usage_error(std::string_view message, std::string_view fix = {});

// A bundle that is missing, damaged, foreign, or made for something else.
Error bundle_error(std::string_view message, std::string_view fix = {});

// An error of the status that a backend gave, with its message as it is.
Error backend_error(int status, std::string_view message);

// The exception at hand as an error; anything that is none of ours is SD35_FAILED.
Error current_error() noexcept;

}  // namespace libsd35
