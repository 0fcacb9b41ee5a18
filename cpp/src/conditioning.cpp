#include "conditioning.hpp"

#include <algorithm>
#include <cstring>

namespace libsd35 {
namespace {

// Modulation of at most so many bytes is computed in one run of the conditioner.
constexpr std::size_t chunk_bytes = 256 << 20;

}  // namespace

ConditioningSteps::ConditioningSteps(Device& device, EngineSet& engines, ComponentRunner& runner,
                                     const Buffer& hidden, const Buffer& pooled,
                                     std::vector<float> timesteps, Feed adapters)
    : device_(device),
      runner_(runner),
      hidden_(device.upload(hidden)),
      pooled_(device.upload(pooled)),
      timesteps_(std::move(timesteps)),
      adapters_(std::move(adapters)),
      chunk_(chunk_steps(hidden.shape()[0])),
      waits_on_host_(timesteps_.size() > chunk_ && !engines.keeps({"conditioner", "denoiser"})) {
    do {
        compute_chunk();
    } while (waits_on_host_ && computed_ < timesteps_.size());
}

Conditioning ConditioningSteps::next() {
    if (given_ == computed_) compute_chunk();
    const std::size_t place = given_ % chunk_;
    const Buffer chunk = chunks_[waits_on_host_ ? given_ / chunk_ : 0];
    ++given_;
    const Buffer modulation = chunk.row(static_cast<std::int64_t>(place));
    return {context_, waits_on_host_ ? device_.upload(modulation) : modulation};
}

void ConditioningSteps::compute_chunk() {
    const std::size_t count = std::min(chunk_, timesteps_.size() - computed_);
    const auto steps = static_cast<std::int64_t>(count);
    const Buffer some = host_buffer(DType::float32, {steps});
    std::memcpy(some.address(), timesteps_.data() + computed_, some.bytes());
    Feed feed = adapters_;
    feed.emplace_back("prompt_embeds", hidden_);
    feed.emplace_back("pooled", pooled_);
    feed.emplace_back("timesteps", device_.upload(some));
    Outputs out = runner_.run(
        "conditioner", feed,
        {{"samples", hidden_.shape()[0]}, {"tokens", hidden_.shape()[1]}, {"steps", steps}});
    computed_ += count;
    context_ = out.find("context")->second;
    const Buffer& modulation = out.find("modulation")->second;
    if (!waits_on_host_) chunks_.clear();
    chunks_.push_back(waits_on_host_ ? device_.download(modulation) : modulation);
}

std::size_t ConditioningSteps::chunk_steps(std::int64_t samples) const {
    const Component& conditioner = runner_.component("conditioner");
    const Port& port = *conditioner.output("modulation");
    const Shape one_step = port.resolve({{"steps", 1}, {"samples", samples}});
    const std::size_t step_bytes = std::max<std::size_t>(byte_count(one_step, port.dtype), 1);
    std::size_t most = timesteps_.size();
    if (const auto bounds = conditioner.bounds.find("steps"); bounds != conditioner.bounds.end()) {
        most = std::min(most, static_cast<std::size_t>(bounds->second.second));
    }
    return std::max<std::size_t>(1, std::min(most, chunk_bytes / step_bytes));
}

}  // namespace libsd35
