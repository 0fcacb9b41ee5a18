// What a server's operator should know, told to the function that the caller gave.
#pragma once

#include <sd35/sd35.h>

#include <string>

namespace libsd35 {

class Log {
  public:
    Log(sd35_log function, void* user) : function_(function), user_(user) {}

    void warn(const std::string& message) const { tell(SD35_LOG_WARNING, message); }
    void error(const std::string& message) const { tell(SD35_LOG_ERROR, message); }

  private:
    void tell(sd35_log_level level, const std::string& message) const {
        if (function_ != nullptr) function_(level, message.c_str(), user_);
    }

    sd35_log function_;
    void* user_;
};

}  // namespace libsd35
