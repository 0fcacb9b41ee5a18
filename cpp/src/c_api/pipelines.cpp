// Pipelines and what they are.
#include "c_api/handles.hpp"

using libsd35::give;
using libsd35::guarded;
using libsd35::require;
using libsd35::with_usual_values;

namespace {

// What TextFeatures take: a prompt of SD3.5 has 2.7 MB.
constexpr std::uint64_t usual_prompt_cache = 256'000'000;

std::uint32_t narrow(std::int64_t value) {
    return static_cast<std::uint32_t>(value);
}

}  // namespace

void sd35_load_options_init(sd35_load_options* options) {
    *options = {};
    options->size = sizeof *options;
    options->prompt_cache = usual_prompt_cache;
    options->max_prompt_chars = libsd35::usual_prompt_chars;
}

sd35_status sd35_pipeline_load(const char* path, const sd35_load_options* options,
                               sd35_pipeline** pipeline, sd35_error** error) {
    return guarded(error, [&] {
        require(path, "path");
        require(pipeline, "pipeline");
        const sd35_load_options own = with_usual_values(options, sd35_load_options_init, "options");
        *pipeline = nullptr;
        *pipeline = std::make_unique<sd35_pipeline>(path, own).release();
    });
}

sd35_status sd35_pipeline_preload(sd35_pipeline* pipeline, sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        pipeline->pipeline.preload();
    });
}

sd35_status sd35_pipeline_close(sd35_pipeline* pipeline, sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        pipeline->pipeline.close();
    });
}

void sd35_pipeline_free(sd35_pipeline* pipeline) {
    const std::unique_ptr<sd35_pipeline> freed(pipeline);
    if (freed != nullptr) sd35_pipeline_close(freed.get(), nullptr);
}

sd35_status sd35_pipeline_info(const sd35_pipeline* pipeline, sd35_bundle_info* info,
                               sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        const libsd35::Manifest& manifest = pipeline->pipeline.manifest();
        const libsd35::Ranges& ranges = manifest.ranges;
        const libsd35::Defaults& defaults = manifest.defaults;
        sd35_bundle_info own{};
        own.model = manifest.model.c_str();
        own.variant = manifest.variant.c_str();
        own.target = manifest.target.c_str();
        own.builder = manifest.builder.c_str();
        own.policy = manifest.policy.c_str();
        own.guided = manifest.guided ? 1 : 0;
        own.batch[0] = narrow(ranges.batch.first);
        own.batch[1] = narrow(ranges.batch.second);
        own.side[0] = narrow(ranges.size.first);
        own.side[1] = narrow(ranges.size.second);
        own.side_step = narrow(ranges.size_step);
        own.t5_tokens[0] = narrow(ranges.t5_tokens.first);
        own.t5_tokens[1] = narrow(ranges.t5_tokens.second);
        own.default_steps = narrow(defaults.steps);
        own.default_width = narrow(defaults.width);
        own.default_height = narrow(defaults.height);
        own.default_t5_tokens = narrow(defaults.t5_tokens);
        own.default_guidance = defaults.guidance;
        own.default_shift = manifest.shift;
        own.default_sampler = defaults.sampler.c_str();
        own.inpainting = manifest.inpainting ? 1 : 0;
        own.skip_layers = narrow(libsd35::layer_count(manifest).value_or(0));
        const auto& ranks = manifest.adapter_ranks;
        own.adapter_rank = ranks.empty() ? 0 : narrow(ranks.back());
        own.controls = static_cast<std::uint32_t>(manifest.controls.size());
        give(info, own, "info");
    });
}

sd35_status sd35_pipeline_control(const sd35_pipeline* pipeline, size_t index,
                                  sd35_control_info* info, sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        const auto& controls = pipeline->pipeline.manifest().controls;
        if (index >= controls.size()) {
            throw libsd35::usage_error("there is no ControlNet " + std::to_string(index));
        }
        const libsd35::ControlRecord& control = controls[index];
        give(info, {0, control.name.c_str(), control.kind.c_str()}, "info");
    });
}

sd35_status sd35_pipeline_load_adapter(sd35_pipeline* pipeline, const char* name, const char* path,
                                       sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        pipeline->pipeline.adapters().load(name, path);
    });
}

sd35_status sd35_pipeline_unload_adapter(sd35_pipeline* pipeline, const char* name,
                                         sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        pipeline->pipeline.adapters().unload(name);
    });
}

uint64_t sd35_pipeline_anomalies(const sd35_pipeline* pipeline) {
    return pipeline == nullptr ? 0 : pipeline->pipeline.anomalies();
}

int sd35_pipeline_on_fallback(const sd35_pipeline* pipeline) {
    return pipeline != nullptr && pipeline->pipeline.on_fallback() ? 1 : 0;
}

void sd35_pipeline_restore(sd35_pipeline* pipeline) {
    if (pipeline != nullptr) pipeline->pipeline.restore();
}

sd35_status sd35_pipeline_memory(sd35_pipeline* pipeline, sd35_memory** memory,
                                 sd35_error** error) {
    return guarded(error, [&] {
        require(pipeline, "pipeline");
        require(memory, "memory");
        *memory = std::make_unique<sd35_memory>(sd35_memory{pipeline->pipeline.memory()}).release();
    });
}

sd35_status sd35_memory_get(const sd35_memory* memory, sd35_memory_info* info, sd35_error** error) {
    return guarded(error, [&] {
        require(memory, "memory");
        const libsd35::MemoryReport& report = memory->report;
        give(info,
             {0, report.device.used, report.device.peak, report.device.total, report.budget,
              report.planned_peak},
             "info");
    });
}

size_t sd35_memory_engine_count(const sd35_memory* memory) {
    return memory == nullptr ? 0 : memory->report.engines.size();
}

sd35_status sd35_memory_engine(const sd35_memory* memory, size_t index, sd35_engine_info* info,
                               sd35_error** error) {
    return guarded(error, [&] {
        require(memory, "memory");
        if (index >= memory->report.engines.size()) {
            throw libsd35::usage_error("there is no engine " + std::to_string(index));
        }
        const libsd35::EngineMemory& engine = memory->report.engines[index];
        give(info,
             {0, engine.component.c_str(), libsd35::name_of(engine.kind), engine.open ? 1U : 0U,
              engine.weight_bytes},
             "info");
    });
}

void sd35_memory_free(sd35_memory* memory) {
    const std::unique_ptr<sd35_memory> freed(memory);
}
