#include "autoencoder.hpp"

#include <algorithm>

namespace libsd35 {
namespace {

// How a picture that is drawn from is taken, in a bundle whose ControlNets may take others.
constexpr std::array<float, 3> usual_encoding{static_cast<float>(1 / 127.5), -1.0F, 1.0F};

}  // namespace

Buffer Autoencoder::encode(const Buffer& images, std::optional<std::string_view> net) {
    const Shape& shape = images.shape();
    const std::int64_t scale = manifest_.latent_scale;
    Feed feed{{"image", device_.upload(images)}};
    if (!manifest_.controls.empty()) {
        feed.emplace_back("encoding", device_.upload(encoding(net, shape[0])));
    }
    const Outputs out =
        runner_.run("vae_encoder", feed, dims(shape[0], shape[1] / scale, shape[2] / scale));
    return device_.download(out.find("latents")->second);
}

Buffer Autoencoder::decode(const Buffer& latents) {
    const Shape& shape = latents.shape();
    const Outputs out =
        runner_.run("vae_decoder", {{"latents", latents}}, dims(shape[0], shape[2], shape[3]));
    return device_.download(out.find("image")->second);
}

Dims Autoencoder::dims(std::int64_t count, std::int64_t height, std::int64_t width) const {
    const std::int64_t scale = manifest_.latent_scale;
    return {{"batch", count},
            {"height", height},
            {"width", width},
            {"image_height", height * scale},
            {"image_width", width * scale}};
}

// [count, 3]: what the encoder is told of how pictures are taken.
Buffer Autoencoder::encoding(std::optional<std::string_view> net, std::int64_t count) const {
    const ControlRecord* record = net ? manifest_.control(*net) : nullptr;
    const std::array<float, 3>& own = record == nullptr ? usual_encoding : record->encoding;
    Buffer rows = host_buffer(DType::float32, {count, 3});
    for (std::int64_t i = 0; i < count; ++i) {
        std::copy(own.begin(), own.end(), rows.row(i).data<float>());
    }
    return rows;
}

}  // namespace libsd35
