// libFuzzer on what the example server reads: a request, or BadRequest; as JSON, and as a form
// whose fields are the lines of the same bytes and whose files are what is behind them.
#include <cstdlib>

#include "images_api.hpp"

namespace {

// Every refusal can be told.
template <typename Read>
void read(const Read& reading) {
    try {
        reading();
    } catch (const server::BadRequest& error) {
        if (server::error_of(error.what(), "invalid_request_error", 400)
                .dump(-1, ' ', false, nlohmann::json::error_handler_t::replace)
                .empty()) {
            std::abort();
        }
    }
}

server::Form form_of(std::string_view data) {
    server::Form form;
    while (!data.empty()) {
        const std::size_t end = data.find('\n');
        const std::string_view line = data.substr(0, end);
        const std::size_t mark = line.find('=');
        if (mark == std::string_view::npos || end == std::string_view::npos) break;
        form.fields.emplace(line.substr(0, mark), line.substr(mark + 1));
        data.remove_prefix(end + 1);
    }
    form.files.emplace("image", data);
    form.files.emplace("mask", data);
    return form;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::string_view bytes(reinterpret_cast<const char*>(data), size);
    read([&] { server::read_request(bytes); });
    read([&] { server::read_edit(form_of(bytes), true); });
    return 0;
}
