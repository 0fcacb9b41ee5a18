// Time by stage.
#pragma once

#include <chrono>
#include <string>
#include <utility>
#include <vector>

namespace libsd35 {

using Time = std::chrono::steady_clock::time_point;

inline Time now() {
    return std::chrono::steady_clock::now();
}

inline double seconds_between(Time from, Time to) {
    return std::chrono::duration<double>(to - from).count();
}

// Seconds by stage, in the order of their start.
using Timings = std::vector<std::pair<std::string, double>>;

// Splits the time since it was made among stages.
class Clock {
  public:
    Clock() : start_(now()), last_(start_) {}

    Time start() const noexcept { return start_; }
    const Timings& timings() const noexcept { return timings_; }

    // What passed since the last call, or the start, was for this stage.
    void lap(const char* name) {
        const Time time = now();
        stage(name) += seconds_between(last_, time);
        last_ = time;
    }

  private:
    double& stage(const char* name) {
        for (auto& [known, seconds] : timings_) {
            if (known == name) return seconds;
        }
        return timings_.emplace_back(name, 0.0).second;
    }

    Time start_;
    Time last_;
    Timings timings_;
};

}  // namespace libsd35
