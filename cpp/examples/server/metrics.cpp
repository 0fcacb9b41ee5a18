#include "metrics.hpp"

#include <algorithm>
#include <sstream>

namespace server {
namespace {

std::string number(double value) {
    std::ostringstream stream;
    stream.imbue(std::locale::classic());
    stream << value;
    return stream.str();
}

void describe(std::string& out, const std::string& name, const char* type, const char* help) {
    out += "# HELP " + name + " " + help + "\n# TYPE " + name + " " + type + "\n";
}

}  // namespace

void Metrics::Histogram::add(double seconds) {
    const auto place = std::lower_bound(bounds.begin(), bounds.end(), seconds);
    ++counts[static_cast<std::size_t>(place - bounds.begin())];
    sum += seconds;
}

void Metrics::count(int status, double seconds) {
    const std::lock_guard lock(mutex_);
    ++requests_[status];
    seconds_.add(seconds);
}

void Metrics::count_stages(const sd35::Result& result) {
    const std::lock_guard lock(mutex_);
    for (const auto& [stage, seconds] : result.timings()) stages_[stage].add(seconds);
}

std::string Metrics::text(std::size_t waiting, std::uint64_t anomalies, bool on_fallback) const {
    const std::lock_guard lock(mutex_);
    std::string out;
    describe(out, "sd35_requests_total", "counter", "Requests by the status of their response");
    for (const auto& [status, count] : requests_) {
        out += "sd35_requests_total{status=\"" + std::to_string(status) + "\"} " +
               std::to_string(count) + "\n";
    }
    describe(out, "sd35_request_seconds", "histogram", "Time from arrival to response");
    write(out, "sd35_request_seconds", "", seconds_);
    describe(out, "sd35_stage_seconds", "histogram", "Time of a stage of a request");
    for (const auto& [stage, histogram] : stages_) {
        write(out, "sd35_stage_seconds", "stage=\"" + stage + "\"", histogram);
    }
    describe(out, "sd35_waiting", "gauge", "Requests that wait");
    out += "sd35_waiting " + std::to_string(waiting) + "\n";
    describe(out, "sd35_anomalies_total", "counter", "Images unlike those of calibration");
    out += "sd35_anomalies_total " + std::to_string(anomalies) + "\n";
    describe(out, "sd35_fallback", "gauge", "1 while the fallback draws");
    out += std::string("sd35_fallback ") + (on_fallback ? "1" : "0") + "\n";
    return out;
}

void Metrics::write(std::string& out, const std::string& name, const std::string& labels,
                    const Histogram& histogram) {
    const std::string between = labels.empty() ? "" : ",";
    const std::string own = labels.empty() ? "" : "{" + labels + "}";
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < histogram.counts.size(); ++i) {
        total += histogram.counts[i];
        const std::string bound =
            i < Histogram::bounds.size() ? number(Histogram::bounds[i]) : "+Inf";
        out += name + "_bucket{" + labels + between + "le=\"" + bound + "\"} " +
               std::to_string(total) + "\n";
    }
    out += name + "_sum" + own + " " + number(histogram.sum) + "\n";
    out += name + "_count" + own + " " + std::to_string(total) + "\n";
}

}  // namespace server
