// Metrics in Prometheus' text form.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <mutex>
#include <sd35/sd35.hpp>
#include <string>

namespace server {

class Metrics {
  public:
    // A request that ended, with the status of its response.
    void count(int status, double seconds);
    void count_stages(const sd35::Result& result);

    // What is scraped; the last three are looked up then.
    std::string text(std::size_t waiting, std::uint64_t anomalies, bool on_fallback) const;

  private:
    struct Histogram {
        static constexpr std::array<double, 13> bounds{0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1,
                                                       2.5,  5,     10,   25,  60,   120};
        std::array<std::uint64_t, bounds.size() + 1> counts{};
        double sum = 0;

        void add(double seconds);
    };

    static void write(std::string& out, const std::string& name, const std::string& labels,
                      const Histogram& histogram);

    mutable std::mutex mutex_;
    std::map<int, std::uint64_t> requests_;
    Histogram seconds_;
    std::map<std::string, Histogram> stages_;
};

}  // namespace server
