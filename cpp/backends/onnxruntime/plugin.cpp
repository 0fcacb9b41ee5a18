// The functions that libsd35 finds in libsd35-onnxruntime.so.
#include <sd35/sd35.h>

#include <memory>

#include "plugin/guarding.hpp"
#include "session.hpp"

namespace {

using libsd35::write_message;
using libsd35::onnx::Failure;
using libsd35::onnx::OnnxSession;

template <typename Work>
int guarded(sd35_plugin_message* message, const Work& work) noexcept {
    try {
        work();
        return SD35_OK;
    } catch (const Failure& failure) {
        write_message(message, failure.what());
        return failure.status();
    } catch (const std::bad_alloc&) {
        write_message(message, "the host has no memory left — draw a smaller size or batch");
        return SD35_OUT_OF_MEMORY;
    } catch (const std::exception& error) {
        write_message(message, error.what());
        return SD35_FAILED;
    }
}

int open(const sd35_plugin_engine* engine, void** session, sd35_plugin_message* message) {
    return guarded(message, [&] { *session = std::make_unique<OnnxSession>(*engine).release(); });
}

int run(void* session, const sd35_plugin_tensor* inputs, std::size_t input_count,
        const sd35_plugin_tensor* outputs, std::size_t output_count, sd35_plugin_message* message) {
    return guarded(message, [&] {
        static_cast<OnnxSession*>(session)->run(inputs, input_count, outputs, output_count);
    });
}

void close(void* session) {
    const std::unique_ptr<OnnxSession> freed(static_cast<OnnxSession*>(session));
}

// Operators on shapes run on the host in each run, and ONNX Runtime may copy their results from
// memory that it frees afterwards: nothing that a graph may hold on to.
constexpr sd35_plugin_backend table{SD35_PLUGIN_VERSION, 0, open, run, close};

}  // namespace

extern "C" SD35_API const sd35_plugin_backend* sd35_plugin_backend_v1() {
    return &table;
}
