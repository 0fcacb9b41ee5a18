// An HTTP server that draws from a bundle.
//
//     sd35_server BUNDLE [--host ADDRESS] [--port N] [--queue N] [--threads N] [--device NAME]
//                 [--adapter NAME=FILE]...
#include <charconv>
#include <csignal>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "server.hpp"

namespace {

struct Arguments {
    std::string bundle;
    server::Options server;
    sd35::LoadOptions load;
    std::map<std::string, std::string> adapters;  // files by name
};

template <typename T>
void read_number(const std::string& name, const std::string& text, T& into) {
    const char* const end = text.data() + text.size();
    const auto read = std::from_chars(text.data(), end, into);
    if (read.ec != std::errc() || read.ptr != end) {
        throw std::invalid_argument(name + " must be a number, not " + text);
    }
}

void read_option(Arguments& arguments, const std::string& name, const std::string& value) {
    if (name == "--host") {
        arguments.server.host = value;
    } else if (name == "--port") {
        read_number(name, value, arguments.server.port);
    } else if (name == "--queue") {
        read_number(name, value, arguments.server.queue_limit);
    } else if (name == "--threads") {
        read_number(name, value, arguments.load.threads);
    } else if (name == "--device") {
        arguments.load.device = value;
    } else if (name == "--adapter") {
        const std::size_t mark = value.find('=');
        if (mark == std::string::npos) throw std::invalid_argument("--adapter must be NAME=FILE");
        arguments.adapters[value.substr(0, mark)] = value.substr(mark + 1);
    } else {
        throw std::invalid_argument("unknown option " + name);
    }
}

Arguments read_arguments(int count, char** words) {
    if (count < 2 || count % 2 != 0) throw std::invalid_argument("give a bundle, then options");
    Arguments arguments;
    arguments.bundle = words[1];
    for (int i = 2; i < count; i += 2) read_option(arguments, words[i], words[i + 1]);
    return arguments;
}

// Waits for SIGINT or SIGTERM in a thread of its own: a handler may do next to nothing.
class Signals {
  public:
    Signals() {
        sigemptyset(&set_);
        sigaddset(&set_, SIGINT);
        sigaddset(&set_, SIGTERM);
        pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    }

    void wait() const {
        int number = 0;
        sigwait(&set_, &number);
    }

  private:
    sigset_t set_{};
};

}  // namespace

int main(int count, char** words) {
    try {
        Arguments arguments = read_arguments(count, words);
        const Signals signals;  // before any thread
        arguments.load.log = [](sd35_log_level, std::string_view line) {
            std::cerr << line << '\n';
        };
        sd35::Pipeline pipeline(arguments.bundle, arguments.load);
        for (const auto& [name, path] : arguments.adapters) {
            pipeline.load_adapter(name, path);
            arguments.server.adapters.insert(name);
        }
        pipeline.preload();
        server::Server server(pipeline, arguments.server);
        const int port = server.bind();
        std::cout << "http://" << arguments.server.host << ':' << port << std::endl;
        std::thread stopping([&] {
            signals.wait();
            server.stop();
        });
        server.run();
        stopping.join();
    } catch (const std::invalid_argument& error) {
        std::cerr << error.what() << '\n';
        return 2;
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    return 0;
}
