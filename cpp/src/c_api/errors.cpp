// Errors, and the library's version.
#include "c_api/handles.hpp"
#include "version.hpp"

const char* sd35_version(void) {
    return libsd35::version;
}

sd35_status sd35_error_status(const sd35_error* error) {
    return error == nullptr ? SD35_OUT_OF_MEMORY : error->error.status();
}

const char* sd35_error_message(const sd35_error* error) {
    return error == nullptr ? "the host has no memory left" : error->error.message().c_str();
}

void sd35_error_free(sd35_error* error) {
    const std::unique_ptr<sd35_error> freed(error);
}
