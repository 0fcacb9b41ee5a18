#include "controls.hpp"

#include <algorithm>
#include <cstring>

#include "arguments.hpp"
#include "error.hpp"
#include "source_pictures.hpp"
#include "structures.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

constexpr double largest_scale = 100;

sd35_control own_control(const sd35_control* given) {
    require(given, "an entry of controls");
    const sd35_control own = with_usual_values(given, sd35_control_init, "control");
    require(own.name, "the name of an entry of controls");
    return own;
}

Error no_such_net(const Manifest& manifest, std::string_view name) {
    std::vector<std::string> known;
    for (const ControlRecord& control : manifest.controls) known.push_back(control.name);
    return usage_error("there is no ControlNet " + shown(name),
                       known.empty() ? "build the bundle with: --controlnet NAME=DIR"
                                     : "this bundle has: " + join(known));
}

ControlUse use_of(const sd35_control& control, std::int64_t width, std::int64_t height,
                  std::size_t count) {
    const std::string name = "controls[" + shown(control.name) + "]";
    ControlUse use{};
    use.name = control.name;
    use.scale = number("scale of " + name, control.scale, -largest_scale, largest_scale);
    use.start = number("start of " + name, control.start, 0, 1);
    use.end = number("end of " + name, control.end, 0, 1);
    if (use.start >= use.end) {
        throw usage_error(
            name + " starts at " + general(use.start) + " and ends at " + general(use.end),
            "let it start before it ends");
    }
    if (control.image == nullptr) throw usage_error(name + " has no image", "give the picture");
    if (control.image_width != width || control.image_height != height) {
        throw usage_error(name + " is " + size_text(control.image_width, control.image_height) +
                              ", the size is " + size_text(width, height),
                          "give the picture at its final size");
    }
    use.pictures = repeated_picture(control.image, width, height, count);
    use.scales.assign(count, static_cast<float>(use.scale));
    return use;
}

// Buffers of pictures one after another.
Buffer together(const std::vector<const ControlUse*>& uses) {
    Shape shape = uses.front()->pictures.shape();
    shape[0] = 0;
    for (const ControlUse* use : uses) shape[0] += use->pictures.shape()[0];
    Buffer all = host_buffer(DType::uint8, shape);
    std::byte* place = all.address();
    for (const ControlUse* use : uses) {
        std::memcpy(place, use->pictures.address(), use->pictures.bytes());
        place += use->pictures.bytes();
    }
    return all;
}

}  // namespace

bool ControlUse::counts(std::int64_t step, std::int64_t steps) const {
    const auto all = static_cast<double>(steps);
    const auto own = static_cast<double>(step);
    return !(own / all < start || (own + 1) / all > end);
}

bool ControlUse::counts_at_all(std::int64_t steps) const {
    for (std::int64_t step = 0; step < steps; ++step) {
        if (counts(step, steps)) return true;
    }
    return false;
}

bool ControlUse::joins(const ControlUse& other) const {
    return name == other.name && start == other.start && end == other.end;
}

ControlUses control_uses(const Manifest& manifest, const sd35_request& asked, std::int64_t width,
                         std::int64_t height, std::size_t count) {
    if (asked.controls == nullptr && asked.control_count != 0) {
        throw usage_error("controls is NULL");
    }
    std::vector<sd35_control> given;
    for (std::size_t i = 0; i < asked.control_count; ++i) {
        given.push_back(own_control(asked.controls[i]));
        const std::string_view name = given.back().name;
        if (manifest.control(name) == nullptr) throw no_such_net(manifest, name);
        for (std::size_t k = 0; k < i; ++k) {
            if (given[k].name != name) continue;
            throw usage_error("controls has " + shown(name) + " twice", "give each net once");
        }
    }
    ControlUses uses;
    for (const ControlRecord& record : manifest.controls) {
        for (const sd35_control& control : given) {
            if (control.name != record.name) continue;
            ControlUse use = use_of(control, width, height, count);
            if (use.scale != 0) uses.push_back(std::move(use));
        }
    }
    return uses;
}

bool joins(const ControlUses& one, const ControlUses& other) {
    return std::equal(one.begin(), one.end(), other.begin(), other.end(),
                      [](const ControlUse& a, const ControlUse& b) { return a.joins(b); });
}

ControlUses join_controls(const std::vector<const ControlUses*>& requests) {
    ControlUses all = *requests.front();
    if (requests.size() == 1) return all;
    for (std::size_t net = 0; net < all.size(); ++net) {
        std::vector<const ControlUse*> own;
        for (const ControlUses* uses : requests) own.push_back(&(*uses)[net]);
        all[net].pictures = together(own);
        all[net].scales.clear();
        for (const ControlUse* use : own) {
            all[net].scales.insert(all[net].scales.end(), use->scales.begin(), use->scales.end());
        }
    }
    return all;
}

}  // namespace libsd35
