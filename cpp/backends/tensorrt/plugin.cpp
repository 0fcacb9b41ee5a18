// The functions that libsd35 finds in libsd35-tensorrt.so.
#include <memory>

#include "plugin/failure.hpp"
#include "session.hpp"

namespace {

using libsd35::guarded;
using libsd35::trt::PlanSession;

int open(const sd35_plugin_engine* engine, void** session, sd35_plugin_message* message) {
    return guarded(message, [&] { *session = std::make_unique<PlanSession>(*engine).release(); });
}

int run(void* session, const sd35_plugin_tensor* inputs, std::size_t input_count,
        const sd35_plugin_tensor* outputs, std::size_t output_count, sd35_plugin_message* message) {
    return guarded(message, [&] {
        static_cast<PlanSession*>(session)->run(inputs, input_count, outputs, output_count);
    });
}

void close(void* session) {
    const std::unique_ptr<PlanSession> freed(static_cast<PlanSession*>(session));
}

constexpr sd35_plugin_backend table{SD35_PLUGIN_VERSION, 1, open, run, close};

}  // namespace

extern "C" SD35_API const sd35_plugin_backend* sd35_plugin_backend_v1() {
    return &table;
}
