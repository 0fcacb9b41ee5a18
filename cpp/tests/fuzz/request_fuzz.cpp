// libFuzzer on what the example server reads: a request, or BadRequest.
#include <cstdlib>

#include "images_api.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    try {
        server::read_request({reinterpret_cast<const char*>(data), size});
    } catch (const server::BadRequest& error) {
        // Every refusal can be told.
        if (server::error_of(error.what(), "invalid_request_error", 400)
                .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
                .empty()) {
            std::abort();
        }
    }
    return 0;
}
