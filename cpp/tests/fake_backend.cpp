// A plug-in that computes next to nothing, for tests of what calls one: an image is a function of
// its seed and guidance. ThreadSanitizer can watch all of it.
#include <sd35/sd35.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <thread>

#include "plugin/interface.h"

namespace {

struct Fake {
    std::string component;
    int runs = 0;  // a race where two threads run one engine
};

const sd35_plugin_tensor& port(const sd35_plugin_tensor* ports, std::size_t count,
                               const char* name) {
    return *std::find_if(ports, ports + count, [&](const sd35_plugin_tensor& one) {
        return std::strcmp(one.name, name) == 0;
    });
}

float* floats(const sd35_plugin_tensor& tensor) {
    return static_cast<float*>(tensor.address);
}

void denoise(const sd35_plugin_tensor* inputs, std::size_t input_count,
             const sd35_plugin_tensor* outputs, std::size_t output_count) {
    const sd35_plugin_tensor& latents = port(inputs, input_count, "latents");
    const float* guidance = floats(port(inputs, input_count, "guidance"));
    float* next = floats(port(outputs, output_count, "next_latents"));
    const auto images = static_cast<std::size_t>(latents.shape[0]);
    const std::size_t each = latents.bytes / sizeof(float) / images;
    for (std::size_t i = 0; i < images * each; ++i) {
        next[i] = floats(latents)[i] + 0.01F * guidance[i / each];
    }
    const sd35_plugin_tensor& denoised = port(outputs, output_count, "denoised");
    std::memcpy(denoised.address, latents.address, denoised.bytes);
    std::this_thread::yield();
}

void decode(const sd35_plugin_tensor& latents, const sd35_plugin_tensor& image) {
    const auto images = static_cast<std::size_t>(image.shape[0]);
    const std::size_t pixels = image.bytes / images;
    const std::size_t values = latents.bytes / sizeof(float) / images;
    auto* out = static_cast<unsigned char*>(image.address);
    for (std::size_t i = 0; i < images * pixels; ++i) {
        const float value = floats(latents)[i / pixels * values + i % values];
        out[i] = static_cast<unsigned char>(std::clamp(128.0F + 20.0F * value, 0.0F, 255.0F));
    }
}

int open(const sd35_plugin_engine* engine, void** session, sd35_plugin_message*) {
    *session = std::make_unique<Fake>(Fake{engine->component}).release();
    return SD35_OK;
}

int run(void* session, const sd35_plugin_tensor* inputs, std::size_t input_count,
        const sd35_plugin_tensor* outputs, std::size_t output_count, sd35_plugin_message*) {
    auto* fake = static_cast<Fake*>(session);
    ++fake->runs;
    if (fake->component == "denoiser") {
        denoise(inputs, input_count, outputs, output_count);
    } else if (fake->component == "vae_decoder") {
        decode(inputs[0], outputs[0]);
    } else {
        for (std::size_t i = 0; i < output_count; ++i) {
            std::memset(outputs[i].address, 0, outputs[i].bytes);
        }
    }
    return SD35_OK;
}

void close(void* session) {
    const std::unique_ptr<Fake> freed(static_cast<Fake*>(session));
}

constexpr sd35_plugin_backend table{SD35_PLUGIN_VERSION, 0, open, run, close};

}  // namespace

extern "C" SD35_API const sd35_plugin_backend* sd35_plugin_backend_v1() {
    return &table;
}
