// Pictures to latents and back.
#include <algorithm>
#include <cstdint>

#include "c_api/handles.hpp"

using libsd35::guarded;
using libsd35::require;

sd35_status sd35_pipeline_encode(sd35_pipeline* pipeline, const uint8_t* images, size_t count,
                                 uint32_t width, uint32_t height, sd35_array** array,
                                 sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        require(images, "images");
        require(array, "array");
        *array = nullptr;
        // A number that no bundle draws stays one.
        const auto most = static_cast<std::size_t>(INT64_MAX);
        const auto own = static_cast<std::int64_t>(std::min(count, most));
        *array = std::make_unique<sd35_array>(
                     sd35_array{pipeline->pipeline.encode(images, own, width, height)})
                     .release();
    });
}

sd35_status sd35_pipeline_decode(sd35_pipeline* pipeline, const float* latents,
                                 const uint64_t shape[4], sd35_array** array, sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        require(latents, "latents");
        require(shape, "shape");
        require(array, "array");
        *array = nullptr;
        *array = std::make_unique<sd35_array>(sd35_array{pipeline->pipeline.decode(latents, shape)})
                     .release();
    });
}

const void* sd35_array_data(const sd35_array* array, uint64_t shape[4]) {
    if (array == nullptr) return nullptr;
    if (shape != nullptr) std::copy_n(array->values.shape().begin(), 4, shape);
    return array->values.address();
}

void sd35_array_free(sd35_array* array) {
    const std::unique_ptr<sd35_array> freed(array);
}
