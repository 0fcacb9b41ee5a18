// Text to image and image to image on a bundle's engines.
#pragma once

#include <sd35/sd35.h>
#include <sys/types.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fallback.hpp"
#include "renderer.hpp"
#include "turn.hpp"

namespace libsd35 {

// Draws from a bundle. Engines load at first use and stay, unless a budget says otherwise; calls
// from threads take turns. All functions throw Error.
class Pipeline {
  public:
    Pipeline(const std::string& path, const sd35_load_options& options);
    ~Pipeline();
    Pipeline(const Pipeline&) = delete;
    Pipeline& operator=(const Pipeline&) = delete;

    const Manifest& manifest() const noexcept { return manifest_; }

    void preload();
    void close();
    MemoryReport memory();

    std::uint64_t anomalies() const noexcept;
    bool on_fallback() const noexcept { return fallback_ && fallback_->active(); }
    void restore() noexcept;

    // Checks what is to be drawn.
    Request request(const sd35_request& asked) const;

    // The adapters that it knows.
    AdapterShelf& adapters() const noexcept { return *shelf_; }

    // Whether two requests can be drawn in one run.
    bool joins(const Request& one, const Request& other) const;

    // Latents float32 [B, C, h, w] of pictures uint8 [count, height, width, 3].
    Buffer encode(const std::uint8_t* images, std::int64_t count, std::int64_t width,
                  std::int64_t height);

    // Pictures uint8 [B, H, W, 3] of latents float32.
    Buffer decode(const float* latents, const std::uint64_t shape[4]);

    // Draws several requests in one run and sets the outcome of each. They join, and have together
    // no more images than the bundle draws at once.
    void draw(const std::vector<Job*>& jobs);

  private:
    void check_open() const;
    void check_process() const;
    void check_joined(const std::vector<Job*>& jobs) const;

    std::uint32_t max_prompt_chars_;
    pid_t process_;
    Turn turn_;
    std::unique_ptr<Renderer> renderer_;
    std::unique_ptr<Renderer> second_;
    std::optional<Fallback> fallback_;
    Manifest manifest_;
    std::unique_ptr<AdapterShelf> shelf_;
    std::atomic<bool> closed_{false};
};

}  // namespace libsd35
