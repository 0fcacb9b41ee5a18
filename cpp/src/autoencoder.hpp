// Pictures to latents and back, by a bundle's VAE.
#pragma once

#include <optional>
#include <string_view>

#include "runner.hpp"

namespace libsd35 {

class Autoencoder {
  public:
    Autoencoder(Device& device, ComponentRunner& runner, const Manifest& manifest)
        : device_(device), runner_(runner), manifest_(manifest) {}

    // Latents of pictures uint8 [B, H, W, 3], both on the host: float32 [B, C, h, w]. `net` is the
    // ControlNet that they are for, which may take them in its own way. Throw Error.
    Buffer encode(const Buffer& images, std::optional<std::string_view> net = std::nullopt);

    // Pictures of latents, which are on the device: uint8 [B, H, W, 3] on the host.
    Buffer decode(const Buffer& latents);

    // Sizes of the VAE's dynamic dimensions; height and width in latent pixels.
    Dims dims(std::int64_t count, std::int64_t height, std::int64_t width) const;

  private:
    Buffer encoding(std::optional<std::string_view> net, std::int64_t count) const;

    Device& device_;
    ComponentRunner& runner_;
    const Manifest& manifest_;
};

}  // namespace libsd35
