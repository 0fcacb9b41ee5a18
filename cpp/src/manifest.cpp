#include "manifest.hpp"

#include <algorithm>
#include <array>
#include <limits>

#include "error.hpp"
#include "files.hpp"
#include "json_reader.hpp"
#include "manifest_digest.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

// No dimension of a tensor is larger.
constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();

// A manifest of SD3.5 Large has about 100 kB.
constexpr std::uint64_t largest_manifest = 16 << 20;

// What a manifest may require, and this version knows.
constexpr std::array<std::string_view, 4> known{"adapters", "inpainting", "skip-layer-guidance",
                                                "control"};

constexpr const char* rebuild = "build it again with: sd35-trt build";

// ---- Parts of the manifest ----

DType read_dtype(const JsonReader& reader) {
    const auto dtype = dtype_of(reader.text(0, longest_name));
    if (!dtype) throw reader.error("Expected a dtype");
    return *dtype;
}

Port read_port(const JsonReader& reader) {
    Port port{reader.field("name").name(), read_dtype(reader.field("dtype")), {}};
    for (const JsonReader& side : reader.field("shape").items(0, 8)) {
        if (side.is_text()) {
            port.shape.emplace_back(side.name());
        } else {
            port.shape.emplace_back(side.integer(0, most));
        }
    }
    return port;
}

std::vector<Port> read_ports(const JsonReader& reader) {
    std::vector<Port> ports;
    for (const JsonReader& port : reader.items(0, 64)) ports.push_back(read_port(port));
    return ports;
}

std::string read_path(const JsonReader& reader) {
    std::string path = reader.name();
    if (path.find('\0') != std::string::npos) throw reader.error("Expected a path without NUL");
    return path;
}

std::vector<File> read_files(const JsonReader& reader, std::size_t least) {
    std::vector<File> files;
    for (const JsonReader& file : reader.items(least, 1024)) {
        files.push_back({read_path(file.field("path")), file.field("bytes").count(),
                         file.field("sha256").digest()});
    }
    return files;
}

std::optional<std::uint64_t> read_optional_count(const JsonReader& reader, const char* name) {
    const auto field = reader.find(name);
    return field && !field->is_null() ? std::optional(field->count()) : std::nullopt;
}

std::map<std::string, Bounds, std::less<>> read_bounds(const JsonReader& reader) {
    std::map<std::string, Bounds, std::less<>> bounds;
    for (const auto& [name, pair] : reader.members()) {
        bounds[name] = pair.pair(0, std::numeric_limits<std::int64_t>::max());
    }
    return bounds;
}

std::vector<AdapterGroup> read_groups(const JsonReader& reader) {
    std::vector<AdapterGroup> groups;
    for (const JsonReader& item : reader.items(0, 32)) {
        AdapterGroup group{item.field("down").name(), item.field("up").name(), {}};
        for (const JsonReader& block : item.field("layers").items(1, 4096)) {
            std::vector<std::string> linears;
            for (const JsonReader& linear : block.items(1, 64)) linears.push_back(linear.name());
            group.layers.push_back(std::move(linears));
        }
        groups.push_back(std::move(group));
    }
    return groups;
}

Component read_component(const JsonReader& reader) {
    Component component{};
    component.name = reader.field("name").name();
    component.engine = reader.field("engine").name();
    component.files = read_files(reader.field("files"), 1);
    component.inputs = read_ports(reader.field("inputs"));
    component.outputs = read_ports(reader.field("outputs"));
    component.weight_bytes = reader.field("weight_bytes").count();
    for (const auto& [name, count] : reader.field("precisions").members()) {
        component.precisions[name] = count.count();
    }
    for (const auto& [_, place] : reader.field("fp32_places").members()) place.number();
    component.activation_bytes = read_optional_count(reader, "activation_bytes");
    component.allocated_bytes = read_optional_count(reader, "allocated_bytes");
    component.largest_layer_bytes = read_optional_count(reader, "largest_layer_bytes");
    if (const auto bounds = reader.find("bounds")) component.bounds = read_bounds(*bounds);
    if (const auto groups = reader.find("adapters")) component.adapters = read_groups(*groups);
    return component;
}

Bounds read_range(const JsonReader& ranges, const std::string& name) {
    const Bounds range = ranges.field(name).pair(std::numeric_limits<std::int64_t>::min(),
                                                 std::numeric_limits<std::int64_t>::max());
    const auto [low, high] = range;
    if (!(1 <= low && low <= high && high <= most)) {
        throw ranges.error(name + " " + std::to_string(low) + " to " + std::to_string(high) +
                           " is no range");
    }
    return range;
}

Ranges read_ranges(const JsonReader& reader) {
    return {read_range(reader, "batch"), read_range(reader, "size"),
            reader.field("size_step").integer(1, most), read_range(reader, "t5_tokens")};
}

Defaults read_defaults(const JsonReader& reader) {
    const auto [width, height] = reader.field("size").pair(1, most);
    return {reader.field("steps").integer(1, most),
            reader.field("guidance").number(),
            width,
            height,
            reader.field("sampler").text(0, longest_text),
            reader.field("t5_tokens").integer(1, most)};
}

TokenizerRecord read_tokenizer(const JsonReader& reader) {
    constexpr std::int64_t any = std::numeric_limits<std::int64_t>::max();
    return {read_path(reader.field("path")), reader.field("length").integer(1, any),
            reader.field("pad_id").integer(0, any)};
}

void read_model(const JsonReader& reader, Manifest& manifest) {
    manifest.model = reader.field("name").any_text();
    manifest.variant = reader.field("variant").name();
    for (const auto& [_, digest] : reader.field("files").members(65536)) digest.digest();
    if (const auto types = reader.find("quantization")) {
        for (const auto& [_, text] : types->members(64)) text.any_text();
    }
    const auto origin = reader.find("origin");
    if (origin && !origin->is_null()) origin->any_text();
}

void read_policy(const JsonReader& reader, Manifest& manifest) {
    manifest.policy = reader.field("name").any_text();
    reader.field("sha256").digest();
    manifest.all_fp32 = true;
    const auto rules = reader.find("rules");
    if (!rules) return;
    for (const JsonReader& rule : rules->items(0, 65536)) {
        rule.field("component").any_text();
        rule.field("match").any_text();
        if (rule.field("precision").name() != "fp32") manifest.all_fp32 = false;
        if (const auto reason = rule.find("reason")) reason->any_text();
    }
}

void read_scheduler(const JsonReader& reader, Manifest& manifest) {
    manifest.shift = reader.field("shift").number();
    if (!(manifest.shift > 0)) {
        throw reader.error("shift " + general(manifest.shift) + " is not above 0");
    }
    manifest.train_timesteps = reader.field("num_train_timesteps").number();
    if (!(manifest.train_timesteps >= 1 && manifest.train_timesteps <= 1 << 24)) {
        throw reader.error("num_train_timesteps " + general(manifest.train_timesteps) +
                           " is not 1 to 2**24");
    }
}

void read_engine_options(const JsonReader& reader, Manifest& manifest) {
    for (const auto& [name, option] : reader.members()) {
        if (option.is_list()) {
            std::vector<std::string> names;
            for (const JsonReader& entry : option.items(0, SIZE_MAX)) {
                names.push_back(entry.text(0, SIZE_MAX));
            }
            if (name == "compute_capabilities") manifest.compute_capabilities = names;
        } else if (name == "weight_streaming") {
            manifest.weight_streaming = option.boolean();
        } else if (!option.is_scalar()) {
            throw option.error("Expected a text, a number, a boolean, null or a list");
        }
    }
}

ControlRecord read_control(const JsonReader& reader) {
    ControlRecord control{reader.field("name").name(), reader.field("kind").name(), {}};
    const auto encoding = reader.field("encoding").items(3, 3);
    for (std::size_t i = 0; i < encoding.size(); ++i) {
        control.encoding[i] = static_cast<float>(encoding[i].number());
    }
    return control;
}

// Whether the denoiser takes what ControlNets make, of one block or more.
bool takes_residuals(const Manifest& manifest) {
    const Component* denoiser = manifest.component("denoiser");
    const Port* port = denoiser == nullptr ? nullptr : denoiser->input(residuals_port);
    if (port == nullptr || port->shape.empty()) return true;  // for the contract to refuse
    const auto* blocks = std::get_if<std::int64_t>(&port->shape.front());
    return blocks == nullptr || *blocks != 0;
}

void read_features(const JsonReader& reader, Manifest& manifest) {
    if (const auto required = reader.find("requires")) {
        for (const JsonReader& name : required->items(0, 64)) manifest.required.insert(name.name());
    }
    manifest.inpainting = manifest.required.count("inpainting") != 0;
    manifest.skip_layer_guidance = manifest.required.count("skip-layer-guidance") != 0;
    if (const auto ranks = reader.find("adapter_ranks")) {
        for (const JsonReader& rank : ranks->items(0, 64)) {
            manifest.adapter_ranks.push_back(
                rank.integer(1, std::numeric_limits<std::int64_t>::max()));
        }
    }
    if (const auto controls = reader.find("controls")) {
        for (const JsonReader& control : controls->items(0, 64)) {
            manifest.controls.push_back(read_control(control));
        }
    }
    manifest.takes_controls = manifest.required.count("control") != 0 && takes_residuals(manifest);
}

Manifest read_fields(const JsonReader& reader) {
    Manifest manifest{};
    manifest.format = reader.field("format").integer(0, most);
    read_model(reader.field("model"), manifest);
    manifest.target = reader.field("target").name();
    manifest.builder = reader.field("builder").name();
    read_policy(reader.field("policy"), manifest);
    manifest.ranges = read_ranges(reader.field("ranges"));
    manifest.latent_channels = reader.field("latent_channels").integer(1, 4096);
    manifest.latent_scale = reader.field("latent_scale").integer(1, 4096);
    manifest.guided = reader.field("guided").boolean();
    read_scheduler(reader.field("scheduler"), manifest);
    manifest.defaults = read_defaults(reader.field("defaults"));
    for (const auto& [name, tokenizer] : reader.field("tokenizers").members(256)) {
        manifest.tokenizers[name] = read_tokenizer(tokenizer);
    }
    for (const JsonReader& component : reader.field("components").items(0, 256)) {
        manifest.components.push_back(read_component(component));
    }
    manifest.files = read_files(reader.field("files"), 0);
    for (const auto& [name, version] : reader.field("versions").members()) {
        manifest.versions[name] = version.any_text();
    }
    reader.field("command").any_text();
    reader.field("created").any_text();
    const JsonReader calibration = reader.field("calibration");
    if (!calibration.is_null()) calibration.digest();
    read_engine_options(reader.field("engine_options"), manifest);
    read_features(reader, manifest);
    return manifest;
}

// ---- The document ----

// What is read before all else: it says whether the rest can be.
void check_head(const JsonReader& reader, const std::string& path) {
    const std::int64_t format = reader.field("format").integer(
        std::numeric_limits<std::int64_t>::min(), std::numeric_limits<std::int64_t>::max());
    if (format != 1 && format != 2) {
        throw bundle_error(
            path + " has format " + std::to_string(format) + ", this version reads 1 and 2",
            format > 2 ? "upgrade libsd35" : rebuild);
    }
    const auto required = reader.find("requires");
    if (!required) return;
    for (const JsonReader& item : required->items(0, 64)) {
        const std::string name = item.name();
        if (std::find(known.begin(), known.end(), name) != known.end()) continue;
        throw bundle_error(path + " requires " + shown(name) + ", which this version does not know",
                           "upgrade libsd35");
    }
}

std::string read_document(const std::filesystem::path& root) {
    const std::filesystem::path path = root / "bundle.json";
    try {
        return read_file(path, largest_manifest);
    } catch (const FileError& error) {
        if (error.missing()) {
            throw bundle_error(root.string() + " is not a bundle (no bundle.json)",
                               "make one with: sd35-trt build");
        }
        throw bundle_error(path.string() + " cannot be read: " + error.what(), rebuild);
    }
}

}  // namespace

Shape Port::resolve(const Dims& dims) const {
    Shape result;
    for (const auto& side : shape) {
        if (const auto* size = std::get_if<std::int64_t>(&side)) {
            result.push_back(*size);
            continue;
        }
        const auto found = dims.find(std::get<std::string>(side));
        if (found == dims.end()) {
            throw bundle_error("the port " + shown(name) + " has a dimension " +
                                   shown(std::get<std::string>(side)) +
                                   ", which this version does not know",
                               "upgrade libsd35");
        }
        result.push_back(found->second);
    }
    return result;
}

const Port* Component::input(std::string_view port) const {
    const auto found = std::find_if(inputs.begin(), inputs.end(),
                                    [&](const Port& one) { return one.name == port; });
    return found == inputs.end() ? nullptr : &*found;
}

const Port* Component::output(std::string_view port) const {
    const auto found = std::find_if(outputs.begin(), outputs.end(),
                                    [&](const Port& one) { return one.name == port; });
    return found == outputs.end() ? nullptr : &*found;
}

bool Ranges::include(const Ranges& other) const {
    const auto within = [](const Bounds& outer, const Bounds& inner) {
        return outer.first <= inner.first && inner.second <= outer.second;
    };
    return within(batch, other.batch) && within(size, other.size) &&
           within(t5_tokens, other.t5_tokens) && other.size_step % size_step == 0;
}

const Component* Manifest::component(std::string_view name) const {
    const auto found = std::find_if(components.begin(), components.end(),
                                    [&](const Component& one) { return one.name == name; });
    return found == components.end() ? nullptr : &*found;
}

const ControlRecord* Manifest::control(std::string_view name) const {
    const auto found = std::find_if(controls.begin(), controls.end(),
                                    [&](const ControlRecord& one) { return one.name == name; });
    return found == controls.end() ? nullptr : &*found;
}

Manifest read_manifest(const std::filesystem::path& root) {
    const std::string path = (root / "bundle.json").string();
    const std::string data = read_document(root);
    try {
        const nlohmann::json document = parse_json(data);
        const JsonReader reader(document);
        check_head(reader, path);
        if (!manifest_is_whole(data, document, root)) {
            throw bundle_error(path + " is damaged (its digest differs)", rebuild);
        }
        return read_fields(reader);
    } catch (const FieldError& error) {
        throw bundle_error(path + " lacks or misstates a field: " + error.what(), rebuild);
    } catch (const UnreadableJson& error) {
        throw bundle_error(path + " cannot be read: " + error.what(), rebuild);
    }
}

}  // namespace libsd35
