#include "pipeline.hpp"

#include <unistd.h>

#include <cstring>

#include "error.hpp"
#include "sizes.hpp"

namespace libsd35 {
namespace {

constexpr std::uint64_t least_memory = std::uint64_t{1} << 20;

std::optional<std::uint64_t> budget_of(const sd35_load_options& options) {
    if (options.vram_budget == 0) return std::nullopt;
    if (options.vram_budget < least_memory) {
        throw usage_error(std::to_string(options.vram_budget) + " is less than 1 MiB",
                          "give vram_budget in bytes");
    }
    return options.vram_budget;
}

RenderOptions render_options(const sd35_load_options& options) {
    return {options.device == nullptr ? "" : options.device, budget_of(options),
            options.prompt_cache, options.threads, Log(options.log, options.log_user)};
}

}  // namespace

Pipeline::Pipeline(const std::string& path, const sd35_load_options& options)
    : max_prompt_chars_(options.max_prompt_chars), process_(::getpid()) {
    const RenderOptions render = render_options(options);
    Bundle bundle(path, options.verify != 0);
    device_of(bundle, render.device);
    std::optional<Bundle> other;
    if (options.fallback != nullptr) {
        other.emplace(options.fallback, options.verify != 0);
        device_of(*other, render.device);
        check_fallback(bundle, *other);
    }
    manifest_ = bundle.manifest();
    renderer_ = std::make_unique<Renderer>(std::move(bundle), render);
    shelf_ = std::make_unique<AdapterShelf>(renderer_->bundle());
    if (other) {
        second_ = std::make_unique<Renderer>(std::move(*other), render);
        fallback_.emplace(*renderer_, *second_, render.log);
    }
}

Pipeline::~Pipeline() {
    if (::getpid() == process_) return;
    // A fork has neither the threads nor the driver that the engines' destructors would wait for.
    static_cast<void>(renderer_.release());
    static_cast<void>(second_.release());
}

void Pipeline::preload() {
    check_process();
    const Turn::Hold hold = turn_.take("preload");
    check_open();
    renderer_->activate();
    renderer_->engines().open_all();
}

void Pipeline::close() {
    if (::getpid() != process_) return;  // nothing of it is in this process
    const Turn::Hold hold = turn_.take("close");
    if (closed_.exchange(true)) return;
    for (Renderer* renderer : {renderer_.get(), second_.get()}) {
        if (renderer == nullptr) continue;
        renderer->activate();
        renderer->release();
    }
}

MemoryReport Pipeline::memory() {
    check_process();
    check_open();
    renderer_->activate();
    return renderer_->engines().memory();
}

std::uint64_t Pipeline::anomalies() const noexcept {
    return renderer_->anomalies() + (second_ == nullptr ? 0 : second_->anomalies());
}

void Pipeline::restore() noexcept {
    // Without the turn, so that a callback may do it.
    if (fallback_) fallback_->restore();
}

Request Pipeline::request(const sd35_request& asked) const {
    return make_request(manifest_, asked, max_prompt_chars_, shelf_.get());
}

bool Pipeline::joins(const Request& one, const Request& other) const {
    if (!one.joins(other)) return false;
    const std::vector<std::int64_t>& ranks = manifest_.adapter_ranks;
    return total_rank(join_requests({&one, &other}).adapters) <= (ranks.empty() ? 0 : ranks.back());
}

Buffer Pipeline::encode(const std::uint8_t* images, std::int64_t count, std::int64_t width,
                        std::int64_t height) {
    check_count(count, manifest_);
    check_size(width, height, manifest_);
    Buffer own = host_buffer(DType::uint8, {count, height, width, 3});
    std::memcpy(own.address(), images, own.bytes());
    check_process();
    const Turn::Hold hold = turn_.take("encode");
    check_open();
    renderer_->activate();
    return renderer_->encode(own);
}

Buffer Pipeline::decode(const float* latents, const std::uint64_t shape[4]) {
    const Buffer own = check_latents(latents, shape, manifest_);
    check_count(own.shape()[0], manifest_);
    check_process();
    const Turn::Hold hold = turn_.take("decode");
    check_open();
    renderer_->activate();
    return renderer_->decode(own);
}

void Pipeline::draw(const std::vector<Job*>& jobs) {
    check_process();
    check_joined(jobs);
    const Turn::Hold hold = turn_.take("generate");
    check_open();
    renderer_->activate();
    Clock clock;
    if (fallback_) {
        fallback_->draw(jobs, clock);
    } else {
        renderer_->draw(jobs, clock);
    }
}

void Pipeline::check_open() const {
    if (closed_) throw Error(SD35_USAGE, "the pipeline is closed", "load it again");
}

void Pipeline::check_process() const {
    if (::getpid() == process_) return;
    throw usage_error(
        "the pipeline was loaded before this process was forked, and its engines do not work here",
        "load it after the fork, in each child");
}

void Pipeline::check_joined(const std::vector<Job*>& jobs) const {
    if (jobs.size() == 1) return;
    std::size_t images = 0;
    std::vector<Mix> mixes;
    for (const Job* job : jobs) {
        mixes.insert(mixes.end(), job->request.adapters.begin(), job->request.adapters.end());
        images += job->request.count();
        if (!jobs.front()->request.joins(job->request)) {
            throw usage_error("these requests cannot be drawn in one run",
                              "ask sd35_pipeline_joins first");
        }
    }
    const std::int64_t most = manifest_.ranges.batch.second;
    if (images > static_cast<std::size_t>(most)) {
        throw usage_error(std::to_string(images) + " images at once, this bundle draws at most " +
                              std::to_string(most),
                          "join fewer requests");
    }
    check_total_rank(renderer_->bundle(), mixes);
}

}  // namespace libsd35
