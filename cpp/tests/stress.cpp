// Many threads on one pipeline, by sd35.hpp: every image is what it is alone, requests are
// cancelled, memory is looked at, and the pipeline is closed while threads draw.
//
//     stress BUNDLE [DEVICE [BUDGET]]
#include <atomic>
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

sd35::Request request_of(std::size_t number) {
    sd35::Request request("star " + std::to_string(number));
    request.seed = number;
    request.steps = 3;
    request.size = {64, 64};
    request.guidance = 1.0 + static_cast<double>(number);
    return request;
}

Pixels pixels_of(const sd35::Result& result) {
    const sd35::Span<std::uint8_t> image = result.image();
    return {image.begin(), image.end()};
}

class Stress {
  public:
    explicit Stress(sd35::Pipeline& pipeline) : pipeline_(pipeline) {
        for (std::size_t i = 0; i < threads; ++i) {
            alone_.push_back(pixels_of(pipeline_.generate(request_of(i))));
        }
    }

    void expect(bool condition, const char* what) {
        if (condition) return;
        ++failures_;
        std::cerr << what << '\n';
    }

    void draw(std::size_t number) {
        for (int round = 0; round < rounds; ++round) {
            const Pixels drawn = pixels_of(pipeline_.generate(request_of(number)));
            expect(drawn == alone_[number], "an image is another one than alone");
            cancel(number, round);
            static_cast<void>(pipeline_.memory());
            static_cast<void>(pipeline_.anomalies());
        }
    }

    void cancel(std::size_t number, int round) {
        sd35::Request request = request_of(number);
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
            for (;;) pipeline_.generate(request_of(number));
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
    sd35::Pipeline& pipeline_;
    std::vector<Pixels> alone_;
    std::atomic<int> failures_{0};
};

}  // namespace

int main(int count, char** arguments) {
    if (count < 2) {
        std::cerr << "usage: stress BUNDLE [DEVICE [BUDGET]]\n";
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
        return Stress(pipeline).run();
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
