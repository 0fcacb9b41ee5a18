#include "conditioning.hpp"

#include <algorithm>
#include <cstring>

#include "half.hpp"

namespace libsd35 {
namespace {

// Modulation of at most so many bytes is computed in one run of a conditioner.
constexpr std::size_t chunk_bytes = 256 << 20;

// Rows of texts as one array of a type.
Buffer stack(const std::vector<SharedFeatures>& features, Buffer TextFeatures::*part, DType dtype) {
    const Buffer& first = (*features.front()).*part;
    Shape shape{static_cast<std::int64_t>(features.size())};
    shape.insert(shape.end(), first.shape().begin(), first.shape().end());
    Buffer all = host_buffer(dtype, std::move(shape));
    std::byte* place = all.address();
    for (const SharedFeatures& text : features) {
        const Buffer& one = (*text).*part;
        if (one.dtype() == dtype) {
            std::memcpy(place, one.address(), one.bytes());
        } else {
            // A ControlNet may take another.
            convert(one.address(), one.dtype(), place, dtype, element_count(one.shape()));
        }
        place += all.bytes() / features.size();
    }
    return all;
}

std::vector<std::string> with(const std::string& name, std::vector<std::string> names) {
    names.push_back(name);
    return names;
}

}  // namespace

ConditioningSteps::ConditioningSteps(const ConditioningMeans& means, const ConditioningTask& task)
    : device_(means.device),
      runner_(means.runner),
      component_(task.component),
      samples_(static_cast<std::int64_t>(task.features.size())),
      tokens_(task.features.front()->hidden.shape()[0]),
      timesteps_(task.timesteps),
      inputs_(inputs_of(task)),
      chunk_(chunk_steps()),
      waits_on_host_(timesteps_.size() > chunk_ &&
                     !means.engines.keeps(with(component_, task.beside))) {
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

// What it reads of the text, and adapters.
Feed ConditioningSteps::inputs_of(const ConditioningTask& task) const {
    const Component& conditioner = runner_.component(component_);
    Feed feed = task.adapters;
    const auto add = [&](const char* name, Buffer TextFeatures::*part) {
        const Port* port = conditioner.input(name);
        if (port == nullptr) return;
        feed.emplace_back(name, device_.upload(stack(task.features, part, port->dtype)));
    };
    add("prompt_embeds", &TextFeatures::hidden);
    add("pooled", &TextFeatures::pooled);
    return feed;
}

void ConditioningSteps::compute_chunk() {
    const std::size_t count = std::min(chunk_, timesteps_.size() - computed_);
    const auto steps = static_cast<std::int64_t>(count);
    const Buffer some = host_buffer(DType::float32, {steps});
    std::memcpy(some.address(), timesteps_.data() + computed_, some.bytes());
    Feed feed = inputs_;
    feed.emplace_back("timesteps", device_.upload(some));
    Outputs out = runner_.run(component_, feed,
                              {{"samples", samples_}, {"tokens", tokens_}, {"steps", steps}});
    computed_ += count;
    const auto context = out.find("context");
    if (context != out.end()) context_ = context->second;
    const Buffer& modulation = out.find("modulation")->second;
    if (!waits_on_host_) chunks_.clear();
    chunks_.push_back(waits_on_host_ ? device_.download(modulation) : modulation);
}

std::size_t ConditioningSteps::chunk_steps() const {
    const Component& conditioner = runner_.component(component_);
    const Port& port = *conditioner.output("modulation");
    const Shape one_step = port.resolve({{"steps", 1}, {"samples", samples_}});
    const std::size_t step_bytes = std::max<std::size_t>(byte_count(one_step, port.dtype), 1);
    std::size_t most = timesteps_.size();
    if (const auto bounds = conditioner.bounds.find("steps"); bounds != conditioner.bounds.end()) {
        most = std::min(most, static_cast<std::size_t>(bounds->second.second));
    }
    return std::max<std::size_t>(1, std::min(most, chunk_bytes / step_bytes));
}

}  // namespace libsd35
