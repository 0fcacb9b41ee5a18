// Many threads on one pipeline, by sd35.hpp: every image is what it is alone, with all that the
// bundle is built for; requests are cancelled, adapters come and go, memory is looked at, and the
// pipeline is closed while threads draw.
//
//     stress BUNDLE [DEVICE [BUDGET [ADAPTER...]]]
//
// A budget of 0 is none.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <iostream>
#include <sd35/sd35.hpp>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t threads = 8;
constexpr int rounds = 12;

using Pixels = std::vector<std::uint8_t>;

struct Cancel : std::exception {};

constexpr std::uint32_t side = 64;

sd35::Picture picture_of(std::size_t number) {
    sd35::Picture picture{side, side, {}};
    for (std::size_t i = 0; i < std::size_t{3} * side * side; ++i) {
        picture.pixels.push_back(static_cast<std::uint8_t>(i * (number + 1)));
    }
    return picture;
}

sd35::Mask mask_of(std::size_t number) {
    sd35::Mask mask{side, side, std::vector<std::uint8_t>(std::size_t{side} * side, 0)};
    std::fill(mask.pixels.begin() + static_cast<std::ptrdiff_t>(100 * number), mask.pixels.end(),
              std::uint8_t{255});
    return mask;
}

// What requests may ask of a bundle.
struct Offer {
    sd35_bundle_info info;
    std::vector<sd35::ControlInfo> controls;
    std::vector<std::string> adapters;
};

// Each number asks for something else.
sd35::Request request_of(std::size_t number, const Offer& offer) {
    sd35::Request request("(star:1.2) " + std::to_string(number));
    request.seed = number;
    request.steps = 3;
    request.size = {side, side};
    request.guidance = 1.0 + static_cast<double>(number);
    request.weighting = number % 2 == 0;
    if (number % 3 == 0) request.prompts_2 = {"ring"};
    if (number % 3 == 1) request.prompts_3 = {"(square:0.7)"};
    if (number % 4 == 1) request.negatives_3 = {"grey"};
    if (offer.info.skip_layers != 0 && number % 3 == 2) {
        request.skip_layers = sd35::SkipLayerGuidance{{1}, 2.8, 0.0, 0.7};
    }
    if (offer.info.inpainting != 0 && number % 4 == 2) {
        request.image = picture_of(number);
        request.mask = mask_of(number);
        request.paste = true;
    }
    for (std::size_t i = 0; i < offer.controls.size(); ++i) {
        if ((number + i) % 2 != 0) continue;
        request.controls[offer.controls[i].name] = {picture_of(number + i), 0.5, 0.0, 0.7};
    }
    if (!offer.adapters.empty() && number % 2 == 1) {
        request.adapters = {{{offer.adapters[number % offer.adapters.size()], 0.5}}};
    }
    return request;
}

Pixels pixels_of(const sd35::Result& result) {
    const sd35::Span<std::uint8_t> image = result.image();
    return {image.begin(), image.end()};
}

class Stress {
  public:
    Stress(sd35::Pipeline& pipeline, std::vector<std::string> adapters)
        : pipeline_(pipeline), offer_{pipeline.info(), pipeline.controls(), std::move(adapters)} {
        for (std::size_t i = 0; i < threads; ++i) {
            alone_.push_back(pixels_of(pipeline_.generate(request_of(i, offer_))));
        }
    }

    void expect(bool condition, const char* what) {
        if (condition) return;
        ++failures_;
        std::cerr << what << '\n';
    }

    void draw(std::size_t number) {
        for (int round = 0; round < rounds; ++round) {
            sd35::Request request = request_of(number, offer_);
            std::vector<float> last;
            request.callback = [&last](const sd35::Step& step) {
                const sd35::Span<float> denoised = step.denoised();
                last.assign(denoised.begin(), denoised.end());
                return true;
            };
            const sd35::Result result = pipeline_.generate(request);
            expect(pixels_of(result) == alone_[number], "an image is another one than alone");
            expect(last.size() == result.latents().size(), "nothing was denoised");
            cancel(number, round);
            encode(number);
            swap(number);
            static_cast<void>(pipeline_.memory());
            static_cast<void>(pipeline_.anomalies());
        }
    }

    // Pictures to latents and back, between those that are drawn.
    void encode(std::size_t number) {
        const sd35::Latents latents = pipeline_.encode({picture_of(number)});
        expect(latents.values.size() == elements_of(latents), "latents of another size");
        expect(pipeline_.decode(latents).size() == 1, "not one picture");
        sd35::Request request("from latents");
        request.latents = latents;
        request.steps = 2;
        request.decode = false;
        expect(!pipeline_.generate(request).decoded(), "it was decoded");
    }

    // An adapter of a thread's own comes and goes.
    void swap(std::size_t number) {
        if (offer_.adapters.empty()) return;
        const std::string name = "own " + std::to_string(number);
        pipeline_.load_adapter(name, offer_.adapters[number % offer_.adapters.size()]);
        sd35::Request request = request_of(number, offer_);
        request.adapters = {{{name, 0.25}}};
        pipeline_.generate(request);
        pipeline_.unload_adapter(name);
    }

    void cancel(std::size_t number, int round) {
        sd35::Request request = request_of(number, offer_);
        try {
            if (round % 2 == 0) {
                request.callback = [](const sd35::Step&) -> bool { throw Cancel(); };
                pipeline_.generate(request);
            } else {
                request.callback = [](const sd35::Step& step) { return step.index != 1; };
                pipeline_.generate(request);
            }
            expect(false, "a cancelled request has a result");
        } catch (const Cancel&) {
            expect(round % 2 == 0, "something was thrown that was not");
        } catch (const sd35::Error& error) {
            expect(error.status() == SD35_CANCELLED, error.what());
        }
    }

    void draw_until_closed(std::size_t number) {
        try {
            for (;;) pipeline_.generate(request_of(number, offer_));
        } catch (const sd35::Error& error) {
            expect(std::string(error.what()).find("is closed") != std::string::npos, error.what());
        }
    }

    template <typename Work>
    void together(const Work& work) {
        std::vector<std::thread> workers;
        for (std::size_t i = 0; i < threads; ++i) workers.emplace_back(work, i);
        for (std::thread& worker : workers) worker.join();
    }

    int run() {
        together([this](std::size_t i) { draw(i); });
        std::thread closing([this] {
            std::this_thread::sleep_for(std::chrono::milliseconds(50));
            pipeline_.close();
        });
        together([this](std::size_t i) { draw_until_closed(i); });
        closing.join();
        return failures_ == 0 ? 0 : 1;
    }

  private:
    static std::size_t elements_of(const sd35::Latents& latents) {
        std::size_t count = 1;
        for (const std::uint64_t one : latents.shape) count *= static_cast<std::size_t>(one);
        return count;
    }

    sd35::Pipeline& pipeline_;
    Offer offer_;
    std::vector<Pixels> alone_;
    std::atomic<int> failures_{0};
};

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) {
        std::cerr << "usage: stress BUNDLE [DEVICE [BUDGET [ADAPTER...]]]\n";
        return 2;
    }
    try {
        sd35::LoadOptions options;
        options.threads = 1;
        options.prompt_cache = 20'000;  // a few of the prompts
        if (count > 2) options.device = arguments[2];
        if (count > 3) options.vram_budget = std::stoull(arguments[3]);
        options.log = [](sd35_log_level, std::string_view) {};
        sd35::Pipeline pipeline(arguments[1], options);
        return Stress(pipeline, {arguments + std::min(count, 4), arguments + count}).run();
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
