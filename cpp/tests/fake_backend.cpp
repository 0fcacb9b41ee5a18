// A plug-in that computes next to nothing, for tests of what calls one: an image is a function of
// its seed, texts, guidance and schedule. ThreadSanitizer can watch all of it.
//
// Compiled with FAKE_GPU it runs on fake_cudart.cpp's GPU, too: its work is queued, and recorded.
#include <sd35/sd35.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "plugin/interface.h"

#ifdef FAKE_GPU
extern "C" void sd35_fake_launch(void* stream, void (*function)(void*), void* data);
#endif

namespace {

// Tensors that outlive the call, as queued work needs them.
class Tensors {
  public:
    Tensors(const sd35_plugin_tensor* tensors, std::size_t count) : own_(tensors, tensors + count) {
        for (sd35_plugin_tensor& one : own_) {
            names_.emplace_back(one.name);
            shapes_.emplace_back(one.shape, one.shape + one.rank);
        }
        for (std::size_t i = 0; i < own_.size(); ++i) {
            own_[i].name = names_[i].c_str();
            own_[i].shape = shapes_[i].data();
        }
    }

    const sd35_plugin_tensor* data() const { return own_.data(); }
    std::size_t size() const { return own_.size(); }

  private:
    std::vector<sd35_plugin_tensor> own_;
    std::deque<std::string> names_;
    std::deque<std::vector<std::int64_t>> shapes_;
};

struct Fake {
    std::string component;
    sd35_plugin_place place;
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

// Of an input; 0 where there is none.
std::size_t bytes_of(const Tensors& inputs, const char* name) {
    const auto* const end = inputs.data() + inputs.size();
    const auto* const found = std::find_if(inputs.data(), end, [&](const sd35_plugin_tensor& one) {
        return std::strcmp(one.name, name) == 0;
    });
    return found == end ? 0 : found->bytes;
}

std::size_t values_in(const sd35_plugin_tensor& tensor) {
    return tensor.bytes / sizeof(float);
}

// Of what ControlNets made, that of a sample: [blocks, samples, pixels, D], of one sample for all
// where no net ran.
float residual_of(const sd35_plugin_tensor& residuals, std::size_t sample) {
    const auto samples = static_cast<std::size_t>(residuals.shape[1]);
    const std::size_t each = values_in(residuals) / static_cast<std::size_t>(residuals.shape[0]);
    return floats(residuals)[samples == 1 ? 0 : sample * (each / samples)];
}

// A little of everything that the denoiser reads, so that nothing can be another's unseen.
void denoise(const Tensors& inputs, const Tensors& outputs) {
    const auto in = [&](const char* name) { return port(inputs.data(), inputs.size(), name); };
    const sd35_plugin_tensor latents = in("latents");
    float* next = floats(port(outputs.data(), outputs.size(), "next_latents"));
    const auto images = static_cast<std::size_t>(latents.shape[0]);
    const std::size_t each = latents.bytes / sizeof(float) / images;
    for (std::size_t i = 0; i < images; ++i) {
        const auto first = [&](const char* name) {
            const sd35_plugin_tensor tensor = in(name);
            return floats(tensor)[i * (tensor.bytes / sizeof(float) / images)];
        };
        float change = 0.01F * first("guidance") + 0.1F * first("sigma");
        for (const char* name : {"coefficients", "context", "modulation", "uncond_context",
                                 "uncond_modulation", "previous_denoised"}) {
            change += 0.03F * first(name);
        }
        // What a bundle may have besides; of a mask of layers, whether there is one, too.
        for (const char* name : {"next_sigma", "skip_guidance", "mask", "source", "source_noise",
                                 "adapter_scales", "layer_mask"}) {
            if (bytes_of(inputs, name) != 0) change += 0.02F + 0.03F * first(name);
        }
        if (bytes_of(inputs, "residuals") != 0) change += residual_of(in("residuals"), i);
        for (std::size_t k = 0; k < each; ++k) {
            next[i * each + k] = floats(latents)[i * each + k] + change;
        }
    }
    const sd35_plugin_tensor& denoised = port(outputs.data(), outputs.size(), "denoised");
    std::memcpy(denoised.address, latents.address, denoised.bytes);
    std::this_thread::yield();
}

// Texts are told by their tokens.
void encode_text(const Tensors& inputs, const Tensors& outputs) {
    const sd35_plugin_tensor& ids = inputs.data()[0];
    const auto texts = static_cast<std::size_t>(ids.shape[0]);
    const std::size_t tokens = ids.bytes / sizeof(std::int64_t) / texts;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        const sd35_plugin_tensor& out = outputs.data()[i];
        const std::size_t each = out.bytes / sizeof(float) / texts;
        for (std::size_t k = 0; k < texts * each; ++k) {
            const auto id = static_cast<std::int64_t*>(ids.address)[k / each * tokens + k % tokens];
            floats(out)[k] = 0.01F * static_cast<float>(id % 101);
        }
    }
}

// Context and modulation are told by text and time. A ControlNet may read no text.
void condition(const Tensors& inputs, const Tensors& outputs) {
    const auto in = [&](const char* name) { return port(inputs.data(), inputs.size(), name); };
    const sd35_plugin_tensor modulation = port(outputs.data(), outputs.size(), "modulation");
    if (bytes_of(inputs, "prompt_embeds") != 0) {
        const sd35_plugin_tensor embeds = in("prompt_embeds");
        const sd35_plugin_tensor context = port(outputs.data(), outputs.size(), "context");
        const auto samples = static_cast<std::size_t>(embeds.shape[0]);
        const std::size_t from = values_in(embeds) / samples;
        const std::size_t to = values_in(context) / samples;
        for (std::size_t i = 0; i < samples * to; ++i) {
            floats(context)[i] = floats(embeds)[i / to * from + i % from];
        }
    }
    const auto steps = static_cast<std::size_t>(modulation.shape[0]);
    const std::size_t rows = modulation.bytes / sizeof(float) / steps;
    for (std::size_t i = 0; i < steps * rows; ++i) {
        floats(modulation)[i] = 0.001F * floats(in("timesteps"))[i / rows];
    }
}

// What a net makes is told by its picture, its scale, latents and time, and what was made before.
void control(const Tensors& inputs, const Tensors& outputs) {
    const auto in = [&](const char* name) { return port(inputs.data(), inputs.size(), name); };
    const sd35_plugin_tensor out = port(outputs.data(), outputs.size(), "next_residuals");
    const auto images = static_cast<std::size_t>(in("scale").shape[0]);
    const auto samples = static_cast<std::size_t>(out.shape[1]);
    const std::size_t each = values_in(out) / static_cast<std::size_t>(out.shape[0]) / samples;
    for (std::size_t i = 0; i < values_in(out) / each; ++i) {
        const std::size_t sample = i % samples;
        const auto first = [&](const char* name, std::size_t rows) {
            return floats(in(name))[sample % rows * (values_in(in(name)) / rows)];
        };
        const float own =
            first("scale", images) * (first("hint", images) + 0.1F * first("latents", images));
        std::fill_n(floats(out) + i * each, each,
                    own + first("modulation", samples) + residual_of(in("residuals"), sample));
    }
}

// Latents are told by the first bytes of each picture.
void encode(const sd35_plugin_tensor& image, const sd35_plugin_tensor& latents) {
    const auto images = static_cast<std::size_t>(image.shape[0]);
    const std::size_t bytes = image.bytes / images;
    const std::size_t values = values_in(latents) / images;
    const auto* pixels = static_cast<const unsigned char*>(image.address);
    for (std::size_t i = 0; i < images * values; ++i) {
        floats(latents)[i] = static_cast<float>(pixels[i / values * bytes + i % bytes]) / 255.0F;
    }
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
    *session = std::make_unique<Fake>(Fake{engine->component, engine->place}).release();
    return SD35_OK;
}

void compute(const std::string& component, const Tensors& inputs, const Tensors& outputs) {
    if (component == "denoiser") {
        denoise(inputs, outputs);
    } else if (component.find("conditioner") != std::string::npos) {
        condition(inputs, outputs);
    } else if (component == "clip_l" || component == "clip_g" || component == "t5") {
        encode_text(inputs, outputs);
    } else if (component == "vae_decoder") {
        decode(inputs.data()[0], outputs.data()[0]);
    } else if (component == "vae_encoder") {
        encode(port(inputs.data(), inputs.size(), "image"), outputs.data()[0]);
    } else if (component.rfind("control_", 0) == 0) {
        control(inputs, outputs);
    } else {
        for (std::size_t i = 0; i < outputs.size(); ++i) {
            const sd35_plugin_tensor& one = outputs.data()[i];
            std::memset(one.address, 0, one.bytes);
        }
    }
}

#ifdef FAKE_GPU
struct Launch {
    std::string component;
    Tensors inputs;
    Tensors outputs;
};

// A graph does it again and again: what it needs is kept.
void launch(void* data) {
    const auto* own = static_cast<const Launch*>(data);
    compute(own->component, own->inputs, own->outputs);
}

std::deque<Launch>& launches() {
    static std::deque<Launch> all;
    return all;
}
#endif

int run(void* session, const sd35_plugin_tensor* inputs, std::size_t input_count,
        const sd35_plugin_tensor* outputs, std::size_t output_count, sd35_plugin_message*) {
    auto* fake = static_cast<Fake*>(session);
    ++fake->runs;
    const Tensors read(inputs, input_count);
    const Tensors written(outputs, output_count);
#ifdef FAKE_GPU
    if (fake->place.cuda != 0) {
        // Working memory that moves as it grows.
        fake->place.scratch(fake->place.device, outputs[0].bytes);
        launches().push_back(
            {fake->component, Tensors(inputs, input_count), Tensors(outputs, output_count)});
        sd35_fake_launch(fake->place.stream, launch, &launches().back());
        return SD35_OK;
    }
#endif
    compute(fake->component, read, written);
    return SD35_OK;
}

void close(void* session) {
    const std::unique_ptr<Fake> freed(static_cast<Fake*>(session));
}

constexpr sd35_plugin_backend table{SD35_PLUGIN_VERSION, 1, open, run, close};

}  // namespace

extern "C" SD35_API const sd35_plugin_backend* sd35_plugin_backend_v1() {
    return &table;
}
