// A bundle's engines in device memory: which stay, which come and go, within a budget.
#pragma once

#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "device.hpp"
#include "log.hpp"
#include "memory_plan.hpp"
#include "session.hpp"

namespace libsd35 {

// One engine, as sd35_engine_info says.
struct EngineMemory {
    std::string component;
    Residence kind;
    bool open;
    std::uint64_t weight_bytes;
};

struct MemoryReport {
    std::vector<EngineMemory> engines;
    DeviceMemory device;
    std::uint64_t budget;
    std::uint64_t planned_peak;
};

// Opens engines when they are needed and closes what the budget does not let stay. One thread at a
// time, but for memory(); engines are also opened ahead, in a thread of their own.
class EngineSet {
  public:
    EngineSet(const Bundle& bundle, Device& device, std::optional<std::uint64_t> budget,
              std::uint32_t threads, const Log& log);
    ~EngineSet();
    EngineSet(const EngineSet&) = delete;
    EngineSet& operator=(const EngineSet&) = delete;

    bool limited() const noexcept { return planner_.budget().has_value(); }

    // Makes room for requests of this size, which run these ControlNets; dimensions that are left
    // out count as least. Without a budget, the engines of other nets stay, too. Throws Error where
    // the budget is too small.
    void fit(const Dims& dims, const Nets& nets = {});

    // Has something called before the denoiser closes: what others hold of it is released.
    void before_denoiser_closes(std::function<void()> call) { forget_denoiser_ = std::move(call); }

    // The engine of a component, in memory until another is used that needs its room; those that
    // run in every step are in memory together. Throws Error.
    Session& use(std::string_view name);

    // Begins to open an engine while another runs, if both have room.
    void load_ahead(std::string_view name, std::string_view beside);

    // Opens every engine that stays; the denoiser, which takes longest, beside the others.
    void open_all();

    // Whether all of these stay in memory.
    bool keeps(const std::vector<std::string>& names) const;

    // Closes every engine; they open again when they are used.
    void release();

    // What is in memory now; may be called from any thread.
    MemoryReport memory();

  private:
    using Ahead = std::future<std::unique_ptr<Session>>;

    const Placement* placement(std::string_view name) const;
    bool stays(std::string_view name) const;
    std::optional<std::uint64_t> held_bytes(std::string_view name) const;
    bool have_room(std::string_view coming, std::string_view running) const;
    void make_room();
    std::vector<std::string> open_names() const;
    std::unique_ptr<Session> open(const std::string& name, std::optional<std::uint64_t> held) const;
    void keep(std::string_view name, std::unique_ptr<Session> session);
    void close(const std::string& name);

    const Bundle& bundle_;
    Device& device_;
    std::uint32_t threads_;
    MemoryPlanner planner_;
    std::function<void()> forget_denoiser_;
    std::optional<std::pair<Dims, Nets>> fitted_;
    std::map<std::string, std::optional<std::uint64_t>, std::less<>> held_;
    std::map<std::string, Ahead, std::less<>> ahead_;

    // Read by memory(), too.
    mutable std::mutex mutex_;
    MemoryPlan plan_;
    std::uint64_t most_ = 0;
    std::map<std::string, std::unique_ptr<Session>, std::less<>> sessions_;
};

}  // namespace libsd35
