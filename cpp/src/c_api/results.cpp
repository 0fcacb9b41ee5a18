// What was drawn.
#include "c_api/handles.hpp"

using libsd35::guarded;
using libsd35::require;

namespace {

std::size_t side(const sd35_result* result, std::size_t axis) {
    return result == nullptr ? 0 : static_cast<std::size_t>(result->result.images.shape().at(axis));
}

}  // namespace

size_t sd35_result_count(const sd35_result* result) {
    return result == nullptr ? 0 : result->result.seeds.size();
}

uint32_t sd35_result_width(const sd35_result* result) {
    return static_cast<std::uint32_t>(side(result, 2));
}

uint32_t sd35_result_height(const sd35_result* result) {
    return static_cast<std::uint32_t>(side(result, 1));
}

const uint8_t* sd35_result_image(const sd35_result* result, size_t index) {
    const std::size_t count = side(result, 0);
    if (index >= count) return nullptr;
    const libsd35::Buffer& images = result->result.images;
    return images.data<std::uint8_t>() + index * (images.bytes() / count);
}

const float* sd35_result_latents(const sd35_result* result, uint64_t shape[4]) {
    if (result == nullptr) return nullptr;
    const libsd35::Buffer& latents = result->result.latents;
    if (shape != nullptr) std::copy_n(latents.shape().begin(), 4, shape);
    return latents.data<float>();
}

uint64_t sd35_result_seed(const sd35_result* result, size_t index) {
    return index < sd35_result_count(result) ? result->result.seeds[index] : 0;
}

const char* sd35_result_parameters(const sd35_result* result) {
    return result == nullptr ? nullptr : result->result.parameters.c_str();
}

size_t sd35_result_timing_count(const sd35_result* result) {
    return result == nullptr ? 0 : result->result.timings.size();
}

const char* sd35_result_timing(const sd35_result* result, size_t index, double* seconds) {
    if (index >= sd35_result_timing_count(result)) return nullptr;
    const auto& [name, taken] = result->result.timings[index];
    if (seconds != nullptr) *seconds = taken;
    return name.c_str();
}

size_t sd35_result_note_count(const sd35_result* result) {
    return result == nullptr ? 0 : result->result.notes.size();
}

const char* sd35_result_note(const sd35_result* result, size_t index) {
    return index < sd35_result_note_count(result) ? result->result.notes[index].c_str() : nullptr;
}

size_t sd35_result_anomaly_count(const sd35_result* result) {
    return result == nullptr ? 0 : result->result.anomalies.size();
}

sd35_status sd35_result_anomaly(const sd35_result* result, size_t index, sd35_anomaly* anomaly,
                                sd35_error** error) {
    return guarded(error, [&] {
        require(result, "result");
        if (index >= result->result.anomalies.size()) {
            throw libsd35::usage_error("there is no anomaly " + std::to_string(index));
        }
        const libsd35::Anomaly& one = result->result.anomalies[index];
        libsd35::give(
            anomaly,
            {0, static_cast<std::uint32_t>(one.image), static_cast<std::uint32_t>(one.step),
             one.sigma, one.seed, one.prompt.c_str(), one.what.c_str(), one.finite ? 1U : 0U},
            "anomaly");
    });
}

void sd35_result_free(sd35_result* result) {
    const std::unique_ptr<sd35_result> freed(result);
}
