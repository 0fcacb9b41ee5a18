#include "error.hpp"

#include <new>

#include "text.hpp"

namespace libsd35 {

Error::Error(sd35_status status, std::string_view message, std::string_view fix)
    : status_(status), message_(one_line(message)) {
    if (fix.empty()) return;
    while (!message_.empty() && message_.back() == '.') message_.pop_back();
    message_ += " — ";
    message_ += fix;
}

Error usage_error(std::string_view message, std::string_view fix) {
    return Error(SD35_USAGE, message, fix);
}

Error bundle_error(std::string_view message, std::string_view fix) {
    return Error(SD35_BUNDLE, message, fix);
}

Error backend_error(int status, std::string_view message) {
    const bool known = status > SD35_OK && status <= SD35_NOT_FINITE;
    return Error(known ? static_cast<sd35_status>(status) : SD35_FAILED, message);
}

Error current_error() noexcept {
    try {
        throw;
    } catch (const Error& error) {
        return error;
    } catch (const std::bad_alloc&) {
        return Error(SD35_OUT_OF_MEMORY, "the host has no memory left",
                     "draw a smaller size or batch");
    } catch (const std::exception& error) {
        return Error(SD35_FAILED, error.what(), "report this");
    } catch (...) {
        return Error(SD35_FAILED, "something unknown was thrown", "report this");
    }
}

}  // namespace libsd35
