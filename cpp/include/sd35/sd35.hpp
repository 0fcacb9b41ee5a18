// libsd35 in C++17: owners that free what they hold, exceptions, functions as callbacks.
//
//     sd35::Pipeline pipeline("bundles/mini-cpu");
//     sd35::Request request("a lighthouse at dusk");
//     request.seed = 7;
//     const sd35::Result result = pipeline.generate(request);
//
// Everything is in this header; it calls the functions of sd35.h.
#ifndef SD35_SD35_HPP
#define SD35_SD35_HPP

#include <sd35/sd35.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace sd35 {

// A failure: one line, what, where, and what to do about it.
class Error : public std::runtime_error {
  public:
    Error(sd35_status status, const std::string& message)
        : std::runtime_error(message), status_(status) {}

    sd35_status status() const noexcept { return status_; }

  private:
    sd35_status status_;
};

// Values of another's, in a row.
template <typename T>
class Span {
  public:
    Span() = default;
    Span(const T* data, std::size_t size) : data_(data), size_(size) {}

    const T* data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }
    bool empty() const noexcept { return size_ == 0; }
    const T* begin() const noexcept { return data_; }
    const T* end() const noexcept { return data_ + size_; }
    const T& operator[](std::size_t i) const noexcept { return data_[i]; }

  private:
    const T* data_ = nullptr;
    std::size_t size_ = 0;
};

using Shape = std::array<std::uint64_t, 4>;

namespace detail {

struct Free {
    void operator()(sd35_pipeline* handle) const noexcept { sd35_pipeline_free(handle); }
    void operator()(sd35_result* handle) const noexcept { sd35_result_free(handle); }
    void operator()(sd35_memory* handle) const noexcept { sd35_memory_free(handle); }
    void operator()(sd35_array* handle) const noexcept { sd35_array_free(handle); }
    void operator()(sd35_error* handle) const noexcept { sd35_error_free(handle); }
};

template <typename T>
using Owner = std::unique_ptr<T, Free>;

inline Error taken(sd35_status status, sd35_error* error) {
    const Owner<sd35_error> owner(error);
    return Error(status, sd35_error_message(error));
}

// Calls a function with a place for its error; throws it.
template <typename Call>
void check(const Call& call) {
    sd35_error* error = nullptr;
    const sd35_status status = call(&error);
    if (status != SD35_OK) throw taken(status, error);
}

inline std::size_t elements(const Shape& shape) {
    return static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]);
}

}  // namespace detail

// What a callback sees after each step; valid during the call.
struct Step {
    std::uint32_t index;  // 0 ... total - 1
    std::uint32_t total;
    float sigma;          // noise level after the step; 0 after the last
    Span<float> latents;  // of `shape`
    Shape shape;          // batch, channels, height, width
    const sd35_step* own;

    // Its estimate of the finished latents, of `shape`, which a preview shows; fetched from the
    // device.
    Span<float> denoised() const {
        const float* values = nullptr;
        detail::check([&](sd35_error** error) { return sd35_step_denoised(own, &values, error); });
        return {values, latents.size()};
    }
};

// Returns false to cancel the request. What it throws cancels, too, and is thrown again by
// Pipeline::generate.
using Callback = std::function<bool(const Step&)>;

// A picture to start from: RGB, row-major, of the size that is drawn.
struct Picture {
    std::uint32_t width;
    std::uint32_t height;
    std::vector<std::uint8_t> pixels;
};

// Which pixels of a picture are drawn anew: those of 128 and more; row-major, of its size.
struct Mask {
    std::uint32_t width;
    std::uint32_t height;
    std::vector<std::uint8_t> pixels;
};

// Latents of pictures, as results have them: `values` are of `shape`, batch, channels, height and
// width.
struct Latents {
    Shape shape;
    std::vector<float> values;
};

// What a ControlNet of the bundle follows.
struct Control {
    Picture image;  // such as edges; of the size that is drawn
    double scale = 1;
    double start = 0;  // fractions of the steps between which it runs
    double end = 1;
};

// A ControlNet of a bundle.
struct ControlInfo {
    std::string name;
    std::string kind;  // of its pictures: canny (edges), depth, blur, other
};

// Away from what the model draws without some of its blocks.
struct SkipLayerGuidance {
    std::vector<std::int64_t> layers;
    double scale = 2.8;
    double start = 0.01;  // fractions of the steps between which it counts
    double stop = 0.2;
};

// How much an image has of each adapter: names of Pipeline::load_adapter, or paths of files.
using Mix = std::map<std::string, double>;

// What is to be drawn; what is not set is left to the bundle.
struct Request {
    Request() = default;
    explicit Request(std::string prompt) : prompts{std::move(prompt)} {}

    std::vector<std::string> prompts;
    std::vector<std::string> negatives;  // none, one for all, or one per prompt
    std::uint64_t seed = 0;              // the first image's, counting up
    std::vector<std::uint64_t> seeds;    // or one per image
    std::int64_t batch = 1;              // images per prompt
    std::optional<std::int64_t> steps;
    std::optional<double> guidance;
    std::optional<double> shift;
    std::optional<std::pair<std::int64_t, std::int64_t>> size;  // width, height
    std::optional<std::int64_t> t5_tokens;
    std::optional<std::string> sampler;
    std::optional<Picture> image;
    double strength = 0.6;  // how much of the picture is redrawn
    Callback callback;
    // Texts for CLIP-G and for T5 where they are others: none, one for all, or one per prompt.
    std::vector<std::string> prompts_2;
    std::vector<std::string> prompts_3;
    std::vector<std::string> negatives_2;
    std::vector<std::string> negatives_3;
    bool weighting = false;  // (text:1.3) in a prompt is a part with this weight
    std::optional<Mask> mask;
    bool paste = false;  // pixels outside of the mask are the image's own in the end
    std::optional<SkipLayerGuidance> skip_layers;
    std::vector<Mix> adapters;                // none, one mix for all, or one per image
    std::map<std::string, Control> controls;  // by the ControlNet's name
    std::optional<Latents> latents;           // to start from, in place of the image
    bool decode = true;                       // false: the result has latents alone
};

struct Anomaly {
    std::uint32_t image;
    std::uint32_t step;
    double sigma;
    std::uint64_t seed;
    std::string prompt;
    std::string what;
    bool finite;
};

// Images and how they came about.
class Result {
  public:
    explicit Result(sd35_result* handle) : handle_(handle) {}

    std::size_t count() const { return sd35_result_count(handle_.get()); }
    std::uint32_t width() const { return sd35_result_width(handle_.get()); }
    std::uint32_t height() const { return sd35_result_height(handle_.get()); }

    // RGB [height, width, 3]; lives as long as the result. There is none where it was not decoded.
    Span<std::uint8_t> image(std::size_t index = 0) const {
        const std::uint8_t* data = sd35_result_image(handle_.get(), index);
        if (data == nullptr) throw std::out_of_range("sd35::Result::image");
        return {data, std::size_t{3} * width() * height()};
    }

    // Whether it has images, not latents alone.
    bool decoded() const { return sd35_result_image(handle_.get(), 0) != nullptr; }

    Shape latent_shape() const {
        Shape shape{};
        sd35_result_latents(handle_.get(), shape.data());
        return shape;
    }

    Span<float> latents() const {
        return {sd35_result_latents(handle_.get(), nullptr), detail::elements(latent_shape())};
    }

    // Those of all images, to start from.
    Latents copy_latents() const {
        const Span<float> values = latents();
        return {latent_shape(), {values.begin(), values.end()}};
    }

    std::uint64_t seed(std::size_t index = 0) const {
        return sd35_result_seed(handle_.get(), index);
    }

    // Everything that would draw the same images again: JSON.
    std::string parameters() const { return sd35_result_parameters(handle_.get()); }

    // Seconds by stage, in their order.
    std::vector<std::pair<std::string, double>> timings() const {
        std::vector<std::pair<std::string, double>> result;
        for (std::size_t i = 0; i < sd35_result_timing_count(handle_.get()); ++i) {
            double seconds = 0;
            const std::string name = sd35_result_timing(handle_.get(), i, &seconds);
            result.emplace_back(name, seconds);
        }
        return result;
    }

    std::vector<std::string> notes() const {
        std::vector<std::string> result;
        for (std::size_t i = 0; i < sd35_result_note_count(handle_.get()); ++i) {
            result.emplace_back(sd35_result_note(handle_.get(), i));
        }
        return result;
    }

    std::vector<Anomaly> anomalies() const {
        std::vector<Anomaly> result;
        for (std::size_t i = 0; i < sd35_result_anomaly_count(handle_.get()); ++i) {
            sd35_anomaly one{};
            one.size = sizeof one;
            detail::check([&](sd35_error** error) {
                return sd35_result_anomaly(handle_.get(), i, &one, error);
            });
            result.push_back(
                {one.image, one.step, one.sigma, one.seed, one.prompt, one.what, one.finite != 0});
        }
        return result;
    }

  private:
    detail::Owner<sd35_result> handle_;
};

// A result, or why there is none.
using Outcome = std::variant<Result, Error>;

struct EngineMemory {
    std::string component;
    std::string kind;  // resident, loaded or streamed
    bool open;
    std::uint64_t weight_bytes;
};

struct Memory {
    std::uint64_t used;
    std::uint64_t peak;
    std::uint64_t total;   // 0 where the device does not say
    std::uint64_t budget;  // 0 is without limit
    std::uint64_t planned_peak;
    std::vector<EngineMemory> engines;
};

struct LoadOptions {
    std::string device;    // cpu, cuda or cuda:N; empty takes what the bundle was built for
    std::string fallback;  // a bundle; empty is none
    std::uint64_t vram_budget = 0;              // bytes; 0 is without limit
    std::optional<std::uint64_t> prompt_cache;  // bytes
    std::uint32_t threads = 0;                  // 0 takes all cores
    std::optional<std::uint32_t> max_prompt_chars;
    bool verify = false;
    // Called with what a server's operator should know; must not throw.
    std::function<void(sd35_log_level, std::string_view)> log;
};

// A bundle that is drawn from, by any number of threads, which take turns.
class Pipeline {
  public:
    explicit Pipeline(const std::string& path, LoadOptions options = {})
        : log_(std::make_unique<Log>(std::move(options.log))) {
        sd35_load_options fields;
        sd35_load_options_init(&fields);
        fields.device = options.device.empty() ? nullptr : options.device.c_str();
        fields.fallback = options.fallback.empty() ? nullptr : options.fallback.c_str();
        fields.vram_budget = options.vram_budget;
        fields.prompt_cache = options.prompt_cache.value_or(fields.prompt_cache);
        fields.threads = options.threads;
        fields.max_prompt_chars = options.max_prompt_chars.value_or(fields.max_prompt_chars);
        fields.verify = options.verify ? 1 : 0;
        fields.log = *log_ ? &Pipeline::tell : nullptr;
        fields.log_user = log_.get();
        sd35_pipeline* handle = nullptr;
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_load(path.c_str(), &fields, &handle, error);
        });
        handle_.reset(handle);
    }

    // Loads every engine that stays in memory now.
    void preload() {
        detail::check(
            [&](sd35_error** error) { return sd35_pipeline_preload(handle_.get(), error); });
    }

    // Releases every engine when what is being drawn is done.
    void close() {
        detail::check(
            [&](sd35_error** error) { return sd35_pipeline_close(handle_.get(), error); });
    }

    // What the bundle accepts; its strings live as long as the pipeline.
    sd35_bundle_info info() const {
        sd35_bundle_info info{};
        info.size = sizeof info;
        detail::check(
            [&](sd35_error** error) { return sd35_pipeline_info(handle_.get(), &info, error); });
        return info;
    }

    // Knows an adapter by a name; `path` is of a file that "sd35-trt adapter convert" wrote.
    void load_adapter(const std::string& name, const std::string& path) {
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_load_adapter(handle_.get(), name.c_str(), path.c_str(), error);
        });
    }

    // Forgets an adapter's name.
    void unload_adapter(const std::string& name) {
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_unload_adapter(handle_.get(), name.c_str(), error);
        });
    }

    // Its ControlNets, in their order.
    std::vector<ControlInfo> controls() const {
        std::vector<ControlInfo> result;
        for (std::size_t i = 0; i < info().controls; ++i) {
            sd35_control_info one{};
            one.size = sizeof one;
            detail::check([&](sd35_error** error) {
                return sd35_pipeline_control(handle_.get(), i, &one, error);
            });
            result.push_back({one.name, one.kind});
        }
        return result;
    }

    // Latents of pictures of one size, to start from.
    Latents encode(const std::vector<Picture>& pictures) {
        const std::uint32_t width = pictures.empty() ? 0 : pictures.front().width;
        const std::uint32_t height = pictures.empty() ? 0 : pictures.front().height;
        std::vector<std::uint8_t> pixels;
        for (const Picture& picture : pictures) {
            Asked::check_pixels(picture, "image");
            if (picture.width != width || picture.height != height) {
                throw Error(SD35_USAGE,
                            "the pictures are of several sizes — encode each by itself");
            }
            pixels.insert(pixels.end(), picture.pixels.begin(), picture.pixels.end());
        }
        static constexpr std::uint8_t nothing = 0;  // no picture has an address, too
        sd35_array* array = nullptr;
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_encode(handle_.get(), pixels.empty() ? &nothing : pixels.data(),
                                        pictures.size(), width, height, &array, error);
        });
        const detail::Owner<sd35_array> owner(array);
        Latents latents{};
        const auto* values =
            static_cast<const float*>(sd35_array_data(array, latents.shape.data()));
        latents.values.assign(values, values + detail::elements(latents.shape));
        return latents;
    }

    // Pictures of latents.
    std::vector<Picture> decode(const Latents& latents) {
        Asked::check_values(latents);
        sd35_array* array = nullptr;
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_decode(handle_.get(), latents.values.data(), latents.shape.data(),
                                        &array, error);
        });
        const detail::Owner<sd35_array> owner(array);
        Shape shape{};
        const auto* pixels = static_cast<const std::uint8_t*>(sd35_array_data(array, shape.data()));
        const std::size_t each = detail::elements(shape) / static_cast<std::size_t>(shape[0]);
        std::vector<Picture> pictures;
        for (std::size_t i = 0; i < shape[0]; ++i, pixels += each) {
            pictures.push_back({static_cast<std::uint32_t>(shape[2]),
                                static_cast<std::uint32_t>(shape[1]),
                                {pixels, pixels + each}});
        }
        return pictures;
    }

    // Checks a request without drawing it.
    void check(const Request& request) const {
        const Asked asked(request);
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_check(handle_.get(), asked.fields(), error);
        });
    }

    // Draws prompts * batch images in one run.
    Result generate(const Request& request) {
        const Asked asked(request);
        sd35_result* result = nullptr;
        sd35_error* error = nullptr;
        const sd35_status status =
            sd35_pipeline_generate(handle_.get(), asked.fields(), &result, &error);
        if (status == SD35_OK) return Result(result);
        const Error failure = detail::taken(status, error);
        asked.rethrow();
        throw failure;
    }

    // Whether two requests can be drawn in one run.
    bool joins(const Request& one, const Request& other) const {
        const Asked first(one);
        const Asked second(other);
        int joins = 0;
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_joins(handle_.get(), first.fields(), second.fields(), &joins,
                                       error);
        });
        return joins != 0;
    }

    // Draws several requests in one run; an outcome for each. What a callback throws becomes an
    // error of the status SD35_CANCELLED.
    std::vector<Outcome> generate_joined(const std::vector<Request>& requests) {
        std::vector<std::unique_ptr<Asked>> asked;
        std::vector<const sd35_request*> fields;
        for (const Request& request : requests) {
            asked.push_back(std::make_unique<Asked>(request));
            fields.push_back(asked.back()->fields());
        }
        std::vector<sd35_result*> results(requests.size());
        std::vector<sd35_error*> errors(requests.size());
        const sd35_status status = sd35_pipeline_generate_joined(
            handle_.get(), fields.data(), fields.size(), results.data(), errors.data());
        std::vector<Outcome> outcomes;
        outcomes.reserve(requests.size());
        for (std::size_t i = 0; i < requests.size(); ++i) {
            if (results[i] != nullptr) {
                outcomes.emplace_back(std::in_place_type<Result>, results[i]);
                continue;
            }
            const sd35_status own = errors[i] == nullptr ? status : sd35_error_status(errors[i]);
            outcomes.emplace_back(detail::taken(own, errors[i]));
        }
        return outcomes;
    }

    Memory memory() {
        sd35_memory* handle = nullptr;
        detail::check([&](sd35_error** error) {
            return sd35_pipeline_memory(handle_.get(), &handle, error);
        });
        const detail::Owner<sd35_memory> owner(handle);
        sd35_memory_info info{};
        info.size = sizeof info;
        detail::check([&](sd35_error** error) { return sd35_memory_get(handle, &info, error); });
        Memory memory{info.used, info.peak, info.total, info.budget, info.planned_peak, {}};
        for (std::size_t i = 0; i < sd35_memory_engine_count(handle); ++i) {
            sd35_engine_info engine{};
            engine.size = sizeof engine;
            detail::check(
                [&](sd35_error** error) { return sd35_memory_engine(handle, i, &engine, error); });
            memory.engines.push_back(
                {engine.component, engine.kind, engine.open != 0, engine.weight_bytes});
        }
        return memory;
    }

    std::uint64_t anomalies() const { return sd35_pipeline_anomalies(handle_.get()); }
    bool on_fallback() const { return sd35_pipeline_on_fallback(handle_.get()) != 0; }
    // Draws with the bundle itself again, from the next request on.
    void restore() { sd35_pipeline_restore(handle_.get()); }

    sd35_pipeline* handle() const noexcept { return handle_.get(); }

  private:
    using Log = std::function<void(sd35_log_level, std::string_view)>;

    // A request as the C functions take it; it refers to the one that it is made of.
    class Asked {
      public:
        explicit Asked(const Request& request) : request_(request) {
            sd35_request_init(&fields_);
            set_texts();
            if (!request.seeds.empty()) {
                fields_.seeds = request.seeds.data();
                fields_.seed_count = request.seeds.size();
            }
            fields_.seed = request.seed;
            fields_.batch = request.batch;
            set_numbers();
            if (request.image) set_image(*request.image);
            if (request.mask) set_mask(*request.mask);
            if (request.skip_layers) set_skip_layers(*request.skip_layers);
            set_adapters();
            set_controls();
            if (request.latents) set_latents(*request.latents);
            fields_.decode = request.decode ? 1 : 0;
            if (request.callback) {
                fields_.callback = &Asked::after_step;
                fields_.callback_user = this;
            }
        }

        Asked(const Asked&) = delete;
        Asked& operator=(const Asked&) = delete;

        const sd35_request* fields() const noexcept { return &fields_; }

        static void check_pixels(const Picture& picture, const std::string& name) {
            if (picture.pixels.size() == std::size_t{3} * picture.width * picture.height) return;
            throw Error(SD35_USAGE, name + " has not three bytes for each of its pixels");
        }

        static void check_values(const Latents& latents) {
            if (latents.values.size() == detail::elements(latents.shape)) return;
            throw Error(SD35_USAGE, "latents have not as many values as their shape says");
        }

        // Throws what the callback threw, if it did.
        void rethrow() const {
            if (thrown_) std::rethrow_exception(thrown_);
        }

      private:
        static std::vector<sd35_text> texts(const std::vector<std::string>& strings) {
            std::vector<sd35_text> result;
            for (const std::string& text : strings) result.push_back({text.data(), text.size()});
            return result;
        }

        void set_texts() {
            set(request_.prompts, fields_.prompts, fields_.prompt_count);
            set(request_.negatives, fields_.negatives, fields_.negative_count);
            set(request_.prompts_2, fields_.prompts_2, fields_.prompt_2_count);
            set(request_.prompts_3, fields_.prompts_3, fields_.prompt_3_count);
            set(request_.negatives_2, fields_.negatives_2, fields_.negative_2_count);
            set(request_.negatives_3, fields_.negatives_3, fields_.negative_3_count);
            fields_.weighting = request_.weighting ? 1 : 0;
            fields_.paste = request_.paste ? 1 : 0;
        }

        void set(const std::vector<std::string>& strings, const sd35_text*& data,
                 std::size_t& count) {
            texts_.push_back(texts(strings));
            data = texts_.back().data();
            count = strings.size();
        }

        void set_numbers() {
            fields_.steps = request_.steps.value_or(fields_.steps);
            fields_.guidance = request_.guidance.value_or(fields_.guidance);
            fields_.shift = request_.shift.value_or(fields_.shift);
            fields_.t5_tokens = request_.t5_tokens.value_or(fields_.t5_tokens);
            fields_.strength = request_.strength;
            if (request_.sampler) fields_.sampler = request_.sampler->c_str();
            if (request_.size) {
                fields_.width = request_.size->first;
                fields_.height = request_.size->second;
            }
        }

        void set_image(const Picture& image) {
            check_pixels(image, "image");
            fields_.image = image.pixels.data();
            fields_.image_width = image.width;
            fields_.image_height = image.height;
        }

        void set_mask(const Mask& mask) {
            if (mask.pixels.size() != std::size_t{mask.width} * mask.height) {
                throw Error(SD35_USAGE, "mask has not one byte for each of its pixels");
            }
            fields_.mask = mask.pixels.data();
            fields_.mask_width = mask.width;
            fields_.mask_height = mask.height;
        }

        void set_skip_layers(const SkipLayerGuidance& skip) {
            static constexpr std::int64_t nothing = 0;  // an empty list has an address, too
            fields_.skip_guidance_layers = skip.layers.empty() ? &nothing : skip.layers.data();
            fields_.skip_guidance_layer_count = skip.layers.size();
            fields_.skip_layer_guidance_scale = skip.scale;
            fields_.skip_layer_guidance_start = skip.start;
            fields_.skip_layer_guidance_stop = skip.stop;
        }

        void set_adapters() {
            for (const Mix& mix : request_.adapters) {
                std::vector<sd35_adapter_use> uses;
                for (const auto& [name, scale] : mix) uses.push_back({name.c_str(), scale});
                uses_.push_back(std::move(uses));
                mixes_.push_back({uses_.back().data(), uses_.back().size()});
            }
            fields_.mixes = mixes_.data();
            fields_.mix_count = mixes_.size();
        }

        void set_controls() {
            for (const auto& [name, control] : request_.controls) {
                check_pixels(control.image, "the image of a control");
                sd35_control own;
                sd35_control_init(&own);
                own.name = name.c_str();
                own.image = control.image.pixels.data();
                own.image_width = control.image.width;
                own.image_height = control.image.height;
                own.scale = control.scale;
                own.start = control.start;
                own.end = control.end;
                controls_.push_back(own);
            }
            for (const sd35_control& control : controls_) control_pointers_.push_back(&control);
            fields_.controls = control_pointers_.data();
            fields_.control_count = control_pointers_.size();
        }

        void set_latents(const Latents& latents) {
            check_values(latents);
            fields_.latents = latents.values.data();
            for (std::size_t i = 0; i < 4; ++i) fields_.latent_shape[i] = latents.shape[i];
        }

        // An exception must not pass through C.
        static int after_step(const sd35_step* step, void* user) noexcept {
            auto* own = static_cast<Asked*>(user);
            try {
                Shape shape{};
                for (std::size_t i = 0; i < shape.size(); ++i) shape[i] = step->shape[i];
                const Span<float> latents(step->latents, detail::elements(shape));
                const Step seen{step->index, step->total, step->sigma, latents, shape, step};
                return own->request_.callback(seen) ? 0 : 1;
            } catch (...) {
                own->thrown_ = std::current_exception();
                return 1;
            }
        }

        const Request& request_;
        // What the fields point to.
        std::vector<std::vector<sd35_text>> texts_;
        std::vector<std::vector<sd35_adapter_use>> uses_;
        std::vector<sd35_mix> mixes_;
        std::vector<sd35_control> controls_;
        std::vector<const sd35_control*> control_pointers_;
        std::exception_ptr thrown_;
        sd35_request fields_;
    };

    static void tell(sd35_log_level level, const char* message, void* user) noexcept {
        (*static_cast<const Log*>(user))(level, message);
    }

    // Outlives the handle, which calls it; stays where it is when the pipeline moves.
    std::unique_ptr<Log> log_;
    detail::Owner<sd35_pipeline> handle_;
};

}  // namespace sd35

#endif
