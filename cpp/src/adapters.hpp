// Adapters of a pipeline: loaded once, mixed for every image, handed to the engines as inputs.
#pragma once

#include <sd35/sd35.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "adapter.hpp"
#include "byte_cache.hpp"
#include "device.hpp"
#include "error.hpp"
#include "session.hpp"

namespace libsd35 {

// The input of a component with how much a sample has of each adapter.
inline constexpr std::string_view adapter_scales = "adapter_scales";

// How much an image has of an adapter; the scale is not 0.
struct Use {
    SharedAdapter adapter;
    std::string name;  // that it was asked for by
    double scale;
};

bool operator==(const Use& one, const Use& other);
bool operator<(const Use& one, const Use& other);

// What an image has of adapters.
using Mix = std::vector<Use>;

// The adapters of some images, each once, in an order that does not depend on theirs.
std::vector<SharedAdapter> distinct(const std::vector<Mix>& mixes);

// Of the adapters of some images, side by side.
std::int64_t total_rank(const std::vector<Mix>& mixes);

// Throws Error where adapters are together of a larger rank than the bundle takes.
void check_total_rank(const Bundle& bundle, const std::vector<Mix>& mixes);

// What of a mix changes the text encoders.
Mix of_texts(const Mix& mix);

// The adapters that a pipeline knows by name, and the latest that were given by path. Any thread.
class AdapterShelf {
  public:
    // The bundle outlives it.
    explicit AdapterShelf(const Bundle& bundle);

    // Knows an adapter by a name, in place of another of that name. Throws Error.
    void load(const char* name, const char* path);
    // Forgets a name; requests that were made before still have its adapter. Throws Error.
    void unload(const char* name);

    // What each image of a request has. Throws Error: an unknown adapter, or ranks that are
    // together more than the bundle takes.
    std::vector<Mix> mixes(const sd35_request& asked, std::size_t count);

  private:
    // Path, time of the last change and size.
    using FileKey = std::tuple<std::string, std::int64_t, std::uint64_t>;

    Mix mix_of(const std::string& name, const sd35_mix& given);
    SharedAdapter find(const std::string& name);
    SharedAdapter find_file(const std::string& path);
    SharedAdapter read(const std::string& path, const std::string& name);
    Error unknown(const std::string& name) const;

    const Bundle& bundle_;
    std::atomic<std::uint64_t> numbers_{0};
    mutable std::mutex mutex_;  // of what follows
    std::map<std::string, SharedAdapter> named_;
    ByteCache<FileKey, Adapter> paths_;
};

// What a run's components take of adapters.
struct AdapterInputs {
    std::vector<SharedAdapter> adapters;  // of the run, in the order of their columns
    std::int64_t rank;                    // columns

    // In a run whose images have these mixes.
    AdapterInputs(const Manifest& manifest, const std::vector<Mix>& mixes);

    // [mixes, rank] of the host: a column is an adapter's rank; 0 where a mix has none of it.
    Buffer scales(const std::vector<Mix>& mixes, DType dtype) const;
};

// Hands adapters to components; their matrices stay on the device while there is room. One thread
// at a time.
class AdapterFeeder {
  public:
    // Within a budget, `before_change` is called before the matrices of the last run make room for
    // others': what still reads them is to forget them. None keeps those of the latest runs.
    AdapterFeeder(const Bundle& bundle, Device& device, std::function<void()> before_change);

    // Inputs of a component by port, for samples of these mixes; none where it takes no adapters.
    // Throws Error.
    Feed ports(std::string_view component, const AdapterInputs& inputs,
               const std::vector<Mix>& mixes);

    // Releases all matrices.
    void clear();

  private:
    using Stacks = std::map<std::string, Buffer>;
    // Component, columns, and the numbers of the adapters.
    using Key = std::tuple<std::string, std::int64_t, std::vector<std::uint64_t>>;

    Stacks stack(const Component& component, const AdapterInputs& inputs) const;

    const Manifest& manifest_;
    Device& device_;
    AdapterSlots slots_;
    ByteCache<Key, Stacks> stacks_;
    std::function<void()> before_change_;
    // Columns and adapters of the last run.
    std::pair<std::int64_t, std::vector<std::uint64_t>> latest_;
};

}  // namespace libsd35
