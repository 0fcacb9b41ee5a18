#include "adapters.hpp"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "arguments.hpp"
#include "half.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

// Bytes of the matrices that are kept on the device, and of files that were given by their path.
constexpr std::uint64_t cache_bytes = std::uint64_t{1} << 30;

constexpr std::uint32_t longest_adapter_name = 4096;
constexpr double largest_scale = 100.0;

auto identity(const Use& use) {
    return std::make_tuple(use.adapter->number, std::string_view(use.name), use.scale);
}

// By source, which does not depend on when it was loaded.
bool comes_first(const SharedAdapter& one, const SharedAdapter& other) {
    return std::tie(one->source, one->number) < std::tie(other->source, other->number);
}

std::string name_of(const std::string& what, const char* name) {
    if (name == nullptr) throw usage_error(what + " is NULL");
    return text_of(what, {name, std::strlen(name)}, longest_adapter_name);
}

// ---- Matrices ----

void put_value(float value, const Buffer& into, std::size_t index) {
    convert(reinterpret_cast<const std::byte*>(&value), DType::float32,
            into.address() + index * item_bytes(into.dtype()), into.dtype(), 1);
}

// Whether a layer's matrices fit in columns from `first` on of A and B, which a manifest may have
// given other sizes than adapters have.
bool has_room(const Buffer& down, const Buffer& up, const AdapterSlot& slot,
              const AdapterLayer& layer, std::int64_t first) {
    const std::int64_t last = first + layer.rank();
    return slot.block < down.shape()[0] && layer.down.shape()[1] == down.shape()[1] &&
           slot.linear < down.shape()[2] && last <= down.shape()[3] && slot.block < up.shape()[0] &&
           slot.linear < up.shape()[1] && last <= up.shape()[2] &&
           layer.up.shape()[0] == up.shape()[3];
}

// Puts a matrix [rows, columns] where its value (r, c) has the place first + r * row + c * column.
void put_matrix(const Buffer& matrix, const Buffer& into, std::int64_t first, std::int64_t row,
                std::int64_t column) {
    const auto* from = matrix.data<float>();
    for (std::int64_t r = 0; r < matrix.shape()[0]; ++r) {
        for (std::int64_t c = 0; c < matrix.shape()[1]; ++c) {
            put_value(*from++, into, static_cast<std::size_t>(first + r * row + c * column));
        }
    }
}

// A [blocks, in, linears, rank] and B [blocks, linears, rank, out] take a layer's matrices,
// transposed.
void put_layer(const Buffer& down, const Buffer& up, const AdapterSlot& slot,
               const AdapterLayer& layer, std::int64_t first) {
    const Shape& a = down.shape();
    const Shape& b = up.shape();
    put_matrix(layer.down, down, ((slot.block * a[1] * a[2]) + slot.linear) * a[3] + first, 1,
               a[2] * a[3]);
    put_matrix(layer.up, up, ((slot.block * b[1] + slot.linear) * b[2] + first) * b[3], 1, b[3]);
}

}  // namespace

bool operator==(const Use& one, const Use& other) {
    return identity(one) == identity(other);
}

bool operator<(const Use& one, const Use& other) {
    return identity(one) < identity(other);
}

std::vector<SharedAdapter> distinct(const std::vector<Mix>& mixes) {
    std::vector<SharedAdapter> found;
    for (const Mix& mix : mixes) {
        for (const Use& use : mix) {
            if (std::find(found.begin(), found.end(), use.adapter) == found.end()) {
                found.push_back(use.adapter);
            }
        }
    }
    std::sort(found.begin(), found.end(), comes_first);
    return found;
}

std::int64_t total_rank(const std::vector<Mix>& mixes) {
    std::int64_t rank = 0;
    for (const SharedAdapter& adapter : distinct(mixes)) rank += adapter->rank();
    return rank;
}

void check_total_rank(const Bundle& bundle, const std::vector<Mix>& mixes) {
    const std::int64_t rank = total_rank(mixes);
    if (rank == 0) return;
    const std::int64_t most = bundle.manifest().adapter_ranks.back();
    if (rank <= most) return;
    throw usage_error("the adapters are of rank " + std::to_string(rank) + " together, " +
                          bundle.root().string() + " takes " + std::to_string(most),
                      "use fewer, or build it with: --adapters " + std::to_string(rank));
}

Mix of_texts(const Mix& mix) {
    Mix own;
    for (const Use& use : mix) {
        if (use.adapter->changes_texts()) own.push_back(use);
    }
    return own;
}

// ---- The shelf ----

AdapterShelf::AdapterShelf(const Bundle& bundle) : bundle_(bundle), paths_(cache_bytes) {}

void AdapterShelf::load(const char* name, const char* path) {
    const std::string own = name_of("the adapter's name", name);
    if (path == nullptr) throw usage_error("path is NULL");
    SharedAdapter adapter = read(path, own);
    const std::lock_guard lock(mutex_);
    named_[own] = std::move(adapter);
}

void AdapterShelf::unload(const char* name) {
    const std::string own = name_of("the adapter's name", name);
    std::size_t forgotten = 0;
    {
        const std::lock_guard lock(mutex_);
        forgotten = named_.erase(own);
    }
    if (forgotten == 0) throw unknown(own);
}

std::vector<Mix> AdapterShelf::mixes(const sd35_request& asked, std::size_t count) {
    if (asked.mix_count == 0) return std::vector<Mix>(count);
    if (asked.mixes == nullptr) throw usage_error("adapters is NULL");
    std::vector<Mix> mixes;
    for (std::size_t i = 0; i < asked.mix_count; ++i) {
        mixes.push_back(mix_of(entry_name("adapters", i, asked.mix_count), asked.mixes[i]));
    }
    if (mixes.size() == 1) mixes.resize(count, mixes.front());
    if (mixes.size() != count) {
        throw usage_error(std::to_string(mixes.size()) + " mixes of adapters for " +
                              std::to_string(count) + " images",
                          "give a mapping, which is for all images, or a list of one for each");
    }
    check_total_rank(bundle_, mixes);
    return mixes;
}

Mix AdapterShelf::mix_of(const std::string& name, const sd35_mix& given) {
    if (given.uses == nullptr && given.count != 0) throw usage_error(name + " is NULL");
    Mix mix;
    for (std::size_t i = 0; i < given.count; ++i) {
        const std::string own = name_of("a name in " + name, given.uses[i].name);
        const double scale = number("the scale of the adapter " + own, given.uses[i].scale,
                                    -largest_scale, largest_scale);
        SharedAdapter adapter = find(own);
        const auto known = std::find_if(mix.begin(), mix.end(),
                                        [&](const Use& use) { return use.adapter == adapter; });
        if (known == mix.end()) {
            mix.push_back({std::move(adapter), own, scale});
        } else {
            *known = {std::move(adapter), own, known->scale + scale};
        }
    }
    mix.erase(std::remove_if(mix.begin(), mix.end(), [](const Use& use) { return use.scale == 0; }),
              mix.end());
    std::sort(mix.begin(), mix.end(), [](const Use& one, const Use& other) {
        return std::tie(one.adapter->source, one.name) <
               std::tie(other.adapter->source, other.name);
    });
    return mix;
}

SharedAdapter AdapterShelf::find(const std::string& name) {
    check_takes_adapters(bundle_);
    {
        const std::lock_guard lock(mutex_);
        const auto found = named_.find(name);
        if (found != named_.end()) return found->second;
    }
    return find_file(name);
}

SharedAdapter AdapterShelf::find_file(const std::string& path) {
    struct stat status {};
    if (::stat(path.c_str(), &status) != 0) throw unknown(path);
    const FileKey key{std::filesystem::absolute(path).string(),
                      std::int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec,
                      static_cast<std::uint64_t>(status.st_size)};
    {
        const std::lock_guard lock(mutex_);
        if (SharedAdapter known = paths_.get(key)) return known;
    }
    SharedAdapter adapter = read(path, path);
    const std::lock_guard lock(mutex_);
    paths_.put(key, adapter, adapter->bytes());
    return adapter;
}

SharedAdapter AdapterShelf::read(const std::string& path, const std::string& name) {
    check_takes_adapters(bundle_);
    Adapter adapter = read_adapter(path);
    check_fits(adapter, bundle_.manifest(), name);
    adapter.number = ++numbers_;
    return std::make_shared<const Adapter>(std::move(adapter));
}

Error AdapterShelf::unknown(const std::string& name) const {
    std::vector<std::string> names;
    const std::lock_guard lock(mutex_);
    for (const auto& [own, _] : named_) names.push_back(own);
    return usage_error(
        "there is no adapter " + shown(name),
        "load it with load_adapter(name, path), or give the path of a file; known: " +
            (names.empty() ? "none is loaded" : join(names)));
}

// ---- Inputs ----

AdapterInputs::AdapterInputs(const Manifest& manifest, const std::vector<Mix>& mixes)
    : adapters(distinct(mixes)), rank(total_rank(mixes)) {
    const std::vector<std::int64_t>& ranks = manifest.adapter_ranks;
    const auto padded =
        std::find_if(ranks.begin(), ranks.end(), [this](std::int64_t own) { return rank <= own; });
    if (rank == 0) {
        rank = 1;  // one column that no image has anything of
    } else if (padded != ranks.end()) {
        rank = *padded;
    }
}

Buffer AdapterInputs::scales(const std::vector<Mix>& mixes, DType dtype) const {
    const auto count = static_cast<std::int64_t>(mixes.size());
    Buffer values = host_zeros(dtype, {count, rank});
    std::int64_t first = 0;
    for (const SharedAdapter& adapter : adapters) {
        for (std::int64_t row = 0; row < count; ++row) {
            for (const Use& use : mixes[static_cast<std::size_t>(row)]) {
                if (use.adapter != adapter) continue;
                for (std::int64_t column = first; column < first + adapter->rank(); ++column) {
                    put_value(static_cast<float>(use.scale), values,
                              static_cast<std::size_t>(row * rank + column));
                }
            }
        }
        first += adapter->rank();
    }
    return values;
}

AdapterFeeder::AdapterFeeder(const Bundle& bundle, Device& device,
                             std::function<void()> before_change)
    : manifest_(bundle.manifest()),
      device_(device),
      slots_(adapter_slots(manifest_)),
      stacks_(cache_bytes),
      before_change_(std::move(before_change)) {}

Feed AdapterFeeder::ports(std::string_view component, const AdapterInputs& inputs,
                          const std::vector<Mix>& mixes) {
    const Component* own = manifest_.component(component);
    if (own == nullptr || own->adapters.empty()) return {};
    std::vector<std::uint64_t> numbers;
    for (const SharedAdapter& adapter : inputs.adapters) numbers.push_back(adapter->number);
    if (std::pair run{inputs.rank, numbers}; before_change_ && run != latest_) {
        before_change_();
        stacks_.clear();
        latest_ = std::move(run);
    }
    const Key key{own->name, inputs.rank, numbers};
    std::shared_ptr<const Stacks> stacks = stacks_.get(key);
    if (stacks == nullptr) {
        stacks = std::make_shared<const Stacks>(stack(*own, inputs));
        std::uint64_t bytes = 0;
        for (const auto& [_, buffer] : *stacks) bytes += buffer.bytes();
        stacks_.put(key, stacks, bytes);
    }
    Feed feed;
    for (const Port& port : own->inputs) {  // whose names live as long as the bundle
        const auto found = stacks->find(port.name);
        if (found != stacks->end()) feed.emplace_back(port.name, found->second);
    }
    const DType dtype = own->input(adapter_scales)->dtype;
    feed.emplace_back(adapter_scales, device_.upload(inputs.scales(mixes, dtype)));
    return feed;
}

void AdapterFeeder::clear() {
    stacks_.clear();
}

AdapterFeeder::Stacks AdapterFeeder::stack(const Component& component,
                                           const AdapterInputs& inputs) const {
    Stacks stacks;
    for (const AdapterGroup& group : component.adapters) {
        for (const std::string& name : {group.down, group.up}) {
            const Port& port = *component.input(name);
            stacks[name] = host_zeros(port.dtype, port.resolve({{"rank", inputs.rank}}));
        }
    }
    std::int64_t first = 0;
    for (const SharedAdapter& adapter : inputs.adapters) {
        for (const auto& [name, layer] : adapter->layers) {
            const auto slot = slots_.find(name);
            if (slot != slots_.end() && slot->second.component != component.name) continue;
            const bool fits = slot != slots_.end() &&
                              has_room(stacks[slot->second.group->down],
                                       stacks[slot->second.group->up], slot->second, layer, first);
            if (!fits) {
                throw bundle_error("an adapter does not fit " + component.name,
                                   "build the bundle, and its fallback, with the same --adapters");
            }
            put_layer(stacks[slot->second.group->down], stacks[slot->second.group->up],
                      slot->second, layer, first);
        }
        first += adapter->rank();
    }
    for (auto& [_, buffer] : stacks) buffer = device_.upload(buffer);
    return stacks;
}

}  // namespace libsd35
