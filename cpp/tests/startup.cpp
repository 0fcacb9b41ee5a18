// From the start of a process to the first picture: prints a JSON object of the moments, in seconds
// of the system's clock.
//
//     startup BUNDLE PROMPT
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sd35/sd35.hpp>

namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch())
        .count();
}

}  // namespace

int main(int count, char** arguments) try {
    if (count != 3) {
        std::cerr << "usage: startup BUNDLE PROMPT\n";
        return 2;
    }
    nlohmann::json moments{{"begun", now()}, {"imported", now()}};
    sd35::Pipeline pipeline(arguments[1]);
    pipeline.preload();
    moments["loaded"] = now();
    sd35::Request request(arguments[2]);
    request.callback = [&](const sd35::Step& step) {
        if (step.index == 0) moments["first step"] = now();
        return true;
    };
    const sd35::Result result = pipeline.generate(request);
    moments["picture"] = now();
    std::cout << moments << '\n';
    return result.count() == 1 ? 0 : 1;
} catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
}
