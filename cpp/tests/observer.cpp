// Stands between libsd35 and its plug-ins, and measures what passes: how long engines take to open
// and run, and what the host does between the steps on a GPU. One library under the names of all
// plug-ins, in a directory that SD35_BACKENDS names:
//
//     SD35_OBSERVED        path of the real plug-in for engines; libsd35-cuda.so is beside it
//     SD35_OBSERVATIONS    a file for the figures at the end of the process; none if not set
//     SD35_OBSERVED_DIRECT other than empty: engines say that they cannot be recorded
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "plugin/interface.h"
#include "sd35/sd35.h"

namespace {

using Clock = std::chrono::steady_clock;
using Interval = std::pair<double, double>;

double now() {
    return std::chrono::duration<double>(Clock::now().time_since_epoch()).count();
}

// Seconds in which at least one of the calls was under way: engines are opened beside each other.
double covered(std::vector<Interval> calls) {
    std::sort(calls.begin(), calls.end());
    double seconds = 0;
    double end = 0;
    for (const auto& [from, to] : calls) {
        seconds += std::max(to, end) - std::max(from, end);
        end = std::max(end, to);
    }
    return seconds;
}

// A step's work being handed to the GPU, and what had been waited until then.
struct Launch {
    double begin;
    double end;
    double waited;
};

class Observations {
  public:
    ~Observations() {
        const char* path = std::getenv("SD35_OBSERVATIONS");
        if (path != nullptr && *path != '\0') std::ofstream(path) << text();
    }

    void engine(double begin) {
        const double end = now();
        const std::lock_guard lock(mutex_);
        engines_.emplace_back(begin, end);
    }

    void launched(double begin, bool replayed) {
        const double end = now();
        const std::lock_guard lock(mutex_);
        launches_.push_back({begin, end, waited_});
        replays_ += replayed ? 1 : 0;
    }

    void waited(double begin) {
        const double end = now();
        const std::lock_guard lock(mutex_);
        waited_ += end - begin;
    }

    std::string text() const {
        const std::lock_guard lock(mutex_);
        std::vector<double> between;
        for (std::size_t i = 1; i < launches_.size(); ++i) {
            const Launch& last = launches_[i - 1];
            const Launch& next = launches_[i];
            between.push_back(next.begin - last.end - (next.waited - last.waited));
        }
        return nlohmann::json{{"engines_seconds", covered(engines_)},
                              {"between_steps_seconds", between},
                              {"replays", replays_}}
            .dump();
    }

    void clear() {
        const std::lock_guard lock(mutex_);
        engines_.clear();
        launches_.clear();
        waited_ = 0;
        replays_ = 0;
    }

  private:
    mutable std::mutex mutex_;
    std::vector<Interval> engines_;
    std::vector<Launch> launches_;
    double waited_ = 0;
    std::size_t replays_ = 0;
};

Observations& seen() {
    static Observations only;
    return only;
}

template <typename Table>
const Table* real(const std::filesystem::path& path, const char* entry_name) {
    void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    const auto entry = reinterpret_cast<const Table* (*)()>(::dlsym(library, entry_name));
    return entry == nullptr ? nullptr : entry();
}

std::filesystem::path observed() {
    const char* path = std::getenv("SD35_OBSERVED");
    return path == nullptr ? "" : path;
}

const sd35_plugin_backend* backend = nullptr;
const sd35_plugin_device* device = nullptr;

struct Session {
    void* inner;
    bool steps;
};

int open(const sd35_plugin_engine* engine, void** session, sd35_plugin_message* message) {
    const double begin = now();
    void* inner = nullptr;
    const int status = backend->open(engine, &inner, message);
    seen().engine(begin);
    if (status == SD35_OK) {
        *session = new Session{inner, std::strcmp(engine->component, "denoiser") == 0};
    }
    return status;
}

int run(void* session, const sd35_plugin_tensor* inputs, std::size_t input_count,
        const sd35_plugin_tensor* outputs, std::size_t output_count, sd35_plugin_message* message) {
    const auto* own = static_cast<const Session*>(session);
    const double begin = now();
    const int status =
        backend->run(own->inner, inputs, input_count, outputs, output_count, message);
    seen().engine(begin);
    if (own->steps) seen().launched(begin, false);
    return status;
}

void close(void* session) {
    const auto* own = static_cast<const Session*>(session);
    backend->close(own->inner);
    delete own;
}

int replay(void* on, void* graph, sd35_plugin_message* message) {
    const double begin = now();
    const int status = device->replay(on, graph, message);
    seen().launched(begin, true);
    return status;
}

int fetch_wait(void* fetch, sd35_plugin_message* message) {
    const double begin = now();
    const int status = device->fetch_wait(fetch, message);
    seen().waited(begin);
    return status;
}

}  // namespace

extern "C" SD35_API const sd35_plugin_backend* sd35_plugin_backend_v1() {
    static sd35_plugin_backend table{};
    backend = real<sd35_plugin_backend>(observed(), SD35_PLUGIN_BACKEND_ENTRY);
    if (backend == nullptr) return nullptr;
    const char* direct = std::getenv("SD35_OBSERVED_DIRECT");
    const bool records = direct == nullptr || *direct == '\0';
    table = {backend->version, records ? backend->recordable : 0, open, run, close};
    return &table;
}

extern "C" SD35_API const sd35_plugin_device* sd35_plugin_device_v1() {
    static sd35_plugin_device table{};
    device = real<sd35_plugin_device>(observed().parent_path() / "libsd35-cuda.so",
                                      SD35_PLUGIN_DEVICE_ENTRY);
    if (device == nullptr) return nullptr;
    table = *device;
    table.replay = replay;
    table.fetch_wait = fetch_wait;
    return &table;
}

// The figures so far, as JSON; valid until the next call. They are forgotten.
extern "C" SD35_API const char* observations() {
    static std::string text;
    text = seen().text();
    seen().clear();
    return text.c_str();
}
