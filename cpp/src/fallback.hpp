// A second bundle that draws when the first one's images are anomalous.
#pragma once

#include <atomic>
#include <string>
#include <vector>

#include "renderer.hpp"

namespace libsd35 {

// Refuses a fallback that cannot draw whatever the bundle can. Throws Error.
void check_fallback(const Bundle& bundle, const Bundle& fallback);

// Draws with the first of two renderers until two anomalous images in a row, then with the second.
// Images whose guidance or shift is unusual do not count. A request with an image that is not
// finite is drawn again with the second at once.
class Fallback {
  public:
    // Of bundles that check_fallback lets pass.
    Fallback(Renderer& first, Renderer& second, const Log& log)
        : first_(first), second_(second), log_(log) {}

    // Whether the second draws.
    bool active() const noexcept { return active_; }

    // Draws with the first again, from the next request on; from any thread.
    void restore() noexcept;

    // See Renderer::draw.
    void draw(const std::vector<Job*>& jobs, Clock& clock);

  private:
    void count(const std::vector<Job*>& jobs);
    void count_image(bool anomalous);
    void draw_second(const std::vector<Job*>& jobs, Clock& clock);

    Renderer& first_;
    Renderer& second_;
    Log log_;
    std::atomic<bool> active_{false};
    std::atomic<int> in_a_row_{0};
};

}  // namespace libsd35
