#include "latent_band.hpp"

#include <algorithm>

#include "error.hpp"
#include "json_reader.hpp"

namespace libsd35 {
namespace {

// A line for every layer of the model.
constexpr std::uint64_t largest_calibration = 64 << 20;
constexpr std::size_t most_steps = 4096;

constexpr const char* calibration_file = "calibration.json";
constexpr const char* rebuild = "build it again with: sd35-trt build";

// How far a healthy image may leave the band; see runtime/latent_guard.py.
constexpr double deviation_factor = 2.0;
constexpr double mean_margin = 0.25;

std::vector<Extent> read_extents(const JsonReader& reader) {
    std::vector<Extent> extents;
    for (const JsonReader& pair : reader.items(0, most_steps)) {
        const auto both = pair.items(2, 2);
        extents.push_back({both[0].number(), both[1].number()});
    }
    return extents;
}

// As numpy.interp: on a line between neighbours, and the ends beyond them.
double on_line(double x, double x0, double y0, double x1, double y1) {
    return x1 == x0 ? y1 : (y1 - y0) / (x1 - x0) * (x - x0) + y0;
}

}  // namespace

std::optional<LatentBand> LatentBand::of(const Bundle& bundle) {
    const auto& files = bundle.manifest().files;
    if (std::none_of(files.begin(), files.end(),
                     [](const File& file) { return file.path == calibration_file; })) {
        return std::nullopt;
    }
    const std::string path = bundle.path(calibration_file).string();
    try {
        const nlohmann::json document =
            parse_json(bundle.read(calibration_file, largest_calibration));
        const auto latents = JsonReader(document).find("latents");
        if (!latents || latents->is_null()) return std::nullopt;
        std::vector<Point> points;
        for (const JsonReader& sigma : latents->field("sigma").items(0, most_steps)) {
            points.push_back({sigma.number(), {}, {}});
        }
        const std::vector<Extent> means = read_extents(latents->field("mean"));
        const std::vector<Extent> deviations = read_extents(latents->field("deviation"));
        if (means.size() != points.size() || deviations.size() != points.size()) {
            throw latents->error("latents have as many sigmas as means and deviations");
        }
        for (std::size_t i = 0; i < points.size(); ++i) {
            points[i].mean = means[i];
            points[i].deviation = deviations[i];
        }
        if (points.empty()) return std::nullopt;
        std::stable_sort(points.begin(), points.end(),
                         [](const Point& a, const Point& b) { return a.sigma < b.sigma; });
        return LatentBand(std::move(points));
    } catch (const FieldError& error) {
        throw bundle_error(path + " lacks or misstates a field: " + error.what(), rebuild);
    } catch (const UnreadableJson& error) {
        throw bundle_error(path + " cannot be read: " + error.what(), rebuild);
    }
}

LatentBand::Expected LatentBand::at(double sigma) const {
    const Point point = between(sigma);
    const double margin = mean_margin * point.deviation.high;
    return {{point.mean.low - margin, point.mean.high + margin},
            {point.deviation.low / deviation_factor, point.deviation.high * deviation_factor}};
}

LatentBand::Point LatentBand::between(double sigma) const {
    const auto after = std::upper_bound(points_.begin(), points_.end(), sigma,
                                        [](double s, const Point& p) { return s < p.sigma; });
    if (after == points_.begin()) return points_.front();
    if (after == points_.end()) return points_.back();
    const Point& a = *(after - 1);
    const Point& b = *after;
    const auto blend = [&](double from, double to) {
        return on_line(sigma, a.sigma, from, b.sigma, to);
    };
    return {sigma,
            {blend(a.mean.low, b.mean.low), blend(a.mean.high, b.mean.high)},
            {blend(a.deviation.low, b.deviation.low), blend(a.deviation.high, b.deviation.high)}};
}

}  // namespace libsd35
