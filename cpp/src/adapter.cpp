#include "adapter.hpp"

#include <sd35_tokenizers.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "error.hpp"
#include "files.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

constexpr std::string_view format_name = "sd35-trt-adapter-1";
constexpr const char* convert =
    "convert the LoRA: sd35-trt adapter convert FILE --for BUNDLE --out FILE";

// Of a layer's name in a message.
constexpr std::size_t longest_layer = 1024;

// A file of more is none of low rank.
constexpr std::uint64_t largest_file = std::uint64_t{8} << 30;

// A component that takes adapters, and the part of the checkpoint that has its linears.
struct Adapted {
    std::string_view component;
    std::string_view part;
};

constexpr std::array<Adapted, 4> adapted{{{"clip_l", "text_encoder"},
                                          {"clip_g", "text_encoder_2"},
                                          {"conditioner", "transformer"},
                                          {"denoiser", "transformer"}}};

struct FreeHeader {
    void operator()(sd35_safetensors* header) const noexcept { sd35_safetensors_free(header); }
};
using Header = std::unique_ptr<sd35_safetensors, FreeHeader>;

const std::uint8_t* bytes_of(std::string_view text) {
    return reinterpret_cast<const std::uint8_t*>(text.data());
}

std::string read_content(const std::filesystem::path& path) {
    std::error_code failure;
    const std::string shown_path = path.string();
    if (!std::filesystem::is_regular_file(path, failure)) {
        throw usage_error("the adapter " + shown_path + " is missing", "give the path of a file");
    }
    if (std::filesystem::file_size(path, failure) > largest_file && !failure) {
        throw usage_error("the adapter " + shown_path + " is larger than 8 GiB", "take another");
    }
    try {
        return read_file(path, largest_file);
    } catch (const FileError& error) {
        throw usage_error("the adapter " + shown_path + " cannot be read: " + error.what(),
                          convert);
    }
}

Header open_header(const std::string& content, const std::string& path) {
    char* message = nullptr;
    Header header(sd35_safetensors_open(bytes_of(content), content.size(), &message));
    if (header != nullptr) return header;
    const std::string reason = message == nullptr ? "no reason given" : message;
    sd35_rust_message_free(message);
    throw usage_error("the adapter " + path + " cannot be read: " + reason, convert);
}

std::string metadata_of(const sd35_safetensors& header, std::string_view key) {
    std::size_t size = 0;
    const std::uint8_t* value =
        sd35_safetensors_metadata(&header, bytes_of(key), key.size(), &size);
    return std::string(reinterpret_cast<const char*>(value), value == nullptr ? 0 : size);
}

// ---- Tensors ----

// A tensor's name: part/layer, and which of the two matrices it is.
struct MatrixName {
    std::string layer;
    bool is_down;
};

bool is_word(char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' ||
           c == '.';
}

bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::optional<MatrixName> parse_name(std::string_view name) {
    const bool is_down = ends_with(name, ".down");
    if (!is_down && !ends_with(name, ".up")) return std::nullopt;
    const std::string_view layer = name.substr(0, name.size() - (is_down ? 5 : 3));
    const std::size_t slash = layer.find('/');
    if (slash == std::string_view::npos) return std::nullopt;
    const std::string_view part = layer.substr(0, slash);
    const std::string_view rest = layer.substr(slash + 1);
    const bool is_part = std::any_of(adapted.begin(), adapted.end(),
                                     [&](const Adapted& row) { return row.part == part; });
    if (!is_part || rest.empty() || !std::all_of(rest.begin(), rest.end(), is_word)) {
        return std::nullopt;
    }
    return MatrixName{std::string(layer), is_down};
}

bool all_finite(const Buffer& matrix) {
    const auto* const first = matrix.data<float>();
    return std::all_of(first, first + matrix.bytes() / sizeof(float),
                       [](float value) { return std::isfinite(value); });
}

// Its values, which the header was seen to have within the content.
Buffer matrix_of(const std::string& content, const sd35_safetensors_entry& entry) {
    Buffer matrix = host_buffer(DType::float32, {static_cast<std::int64_t>(entry.shape[0]),
                                                 static_cast<std::int64_t>(entry.shape[1])});
    if (entry.end > content.size() || matrix.bytes() != entry.end - entry.begin) {
        throw std::logic_error("a header of safetensors that was not checked");
    }
    std::memcpy(matrix.address(), content.data() + entry.begin, matrix.bytes());
    return matrix;
}

using Layers = std::vector<std::pair<std::string, AdapterLayer>>;

Layers layers_of(const std::string& content, const sd35_safetensors& header,
                 const std::string& path) {
    Layers layers;
    std::map<std::string, std::size_t> places;
    for (std::size_t i = 0; i < sd35_safetensors_count(&header); ++i) {
        const sd35_safetensors_entry entry = sd35_safetensors_tensor(&header, i);
        const std::string_view text(reinterpret_cast<const char*>(entry.name), entry.name_size);
        const std::string place = path + ": " + shown(text, longest_layer);
        const auto name = parse_name(text);
        if (!name || entry.rank != 2 || entry.is_float32 == 0 || entry.begin == entry.end) {
            throw usage_error(place + " is no matrix of an adapter", convert);
        }
        const Buffer matrix = matrix_of(content, entry);
        if (!all_finite(matrix)) {
            throw usage_error(place + " holds NaN or infinite values", convert);
        }
        const auto [known, is_new] = places.emplace(name->layer, layers.size());
        if (is_new) layers.emplace_back(name->layer, AdapterLayer{});
        AdapterLayer& layer = layers[known->second].second;
        (name->is_down ? layer.down : layer.up) = matrix;
    }
    return layers;
}

void check_pairs(const Layers& layers, const std::string& path) {
    for (const auto& [name, layer] : layers) {
        if (layer.down && layer.up && layer.down.shape()[0] == layer.up.shape()[1]) continue;
        throw usage_error(
            path + ": the matrices of " + shown(name, longest_layer) + " do not fit each other",
            convert);
    }
    if (layers.empty()) throw usage_error(path + " holds no adapter", convert);
}

}  // namespace

std::int64_t Adapter::rank() const {
    std::int64_t most = 0;
    for (const auto& [_, layer] : layers) most = std::max(most, layer.rank());
    return most;
}

std::uint64_t Adapter::bytes() const {
    std::uint64_t count = 0;
    for (const auto& [_, layer] : layers) count += layer.down.bytes() + layer.up.bytes();
    return count;
}

bool Adapter::changes_texts() const {
    return std::any_of(layers.begin(), layers.end(),
                       [](const auto& one) { return one.first.rfind("text_encoder", 0) == 0; });
}

Adapter read_adapter(const std::filesystem::path& path) {
    const std::string name = path.string();
    const std::string content = read_content(path);
    const Header header = open_header(content, name);
    if (metadata_of(*header, "format") != format_name) {
        throw usage_error(name + " is no adapter of sd35-trt", convert);
    }
    Adapter adapter{layers_of(content, *header, name), metadata_of(*header, "source")};
    check_pairs(adapter.layers, name);
    return adapter;
}

AdapterSlots adapter_slots(const Manifest& manifest) {
    AdapterSlots slots;
    for (const auto& [name, part] : adapted) {
        const Component* component = manifest.component(name);
        if (component == nullptr) continue;
        for (const AdapterGroup& group : component->adapters) {
            const auto side = [&](const std::string& port, std::size_t axis) {
                return std::get<std::int64_t>(component->input(port)->shape.at(axis));
            };
            AdapterSlot slot{component->name, &group, 0, 0, side(group.down, 1), side(group.up, 3)};
            for (const auto& linears : group.layers) {
                slot.linear = 0;
                for (const std::string& layer : linears) {
                    slots[std::string(part) + "/" + layer] = slot;
                    ++slot.linear;
                }
                ++slot.block;
            }
        }
    }
    return slots;
}

void check_takes_adapters(const Bundle& bundle) {
    if (!bundle.manifest().adapter_ranks.empty()) return;
    throw usage_error(bundle.root().string() + " takes no adapters",
                      "build it with: sd35-trt build --adapters RANK");
}

void check_fits(const Adapter& adapter, const Manifest& manifest, const std::string& name) {
    const AdapterSlots slots = adapter_slots(manifest);
    for (const auto& [layer, matrices] : adapter.layers) {
        const std::int64_t in = matrices.down.shape()[1];
        const std::int64_t out = matrices.up.shape()[0];
        const auto slot = slots.find(layer);
        if (slot != slots.end() && slot->second.in == in && slot->second.out == out) continue;
        const std::string own = shown(layer, longest_layer);
        throw usage_error(
            "the adapter " + name + " changes " + own + " from " + std::to_string(in) + " to " +
                std::to_string(out) + " features, the bundle " +
                (slot == slots.end()
                     ? "takes none of " + own
                     : "has " + to_text({slot->second.in, slot->second.out}) + " there"),
            "take an adapter that was converted for this model");
    }
    const std::int64_t most = manifest.adapter_ranks.back();
    if (adapter.rank() > most) {
        throw usage_error("the adapter " + name + " is of rank " + std::to_string(adapter.rank()) +
                              ", the bundle takes " + std::to_string(most) + " together",
                          "build it with: --adapters " + std::to_string(adapter.rank()));
    }
}

}  // namespace libsd35
