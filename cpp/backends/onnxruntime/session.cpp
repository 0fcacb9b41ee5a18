#include "session.hpp"

#include <sd35/sd35.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string_view>

#include "dtype.hpp"
#include "plugin/failure.hpp"

namespace libsd35::onnx {
namespace {

std::string device_name(const sd35_plugin_place& place) {
    return place.cuda != 0 ? "cuda:" + std::to_string(place.index) : "cpu";
}

ONNXTensorElementDataType element_type(std::int32_t dtype) {
    // In the order of DType.
    constexpr std::array<ONNXTensorElementDataType, 8> types{
        ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL,  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
        ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
        ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
        ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE};
    return types.at(static_cast<std::size_t>(dtype));
}

Ort::MemoryInfo memory_of(const sd35_plugin_place& place) {
    if (place.cuda == 0) return Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    return Ort::MemoryInfo("Cuda", OrtDeviceAllocator, place.index, OrtMemTypeDefault);
}

void append_cuda(Ort::SessionOptions& options, const sd35_plugin_place& place,
                 const std::string& version) {
    const std::vector<std::string> providers = Ort::GetAvailableProviders();
    if (std::find(providers.begin(), providers.end(), "CUDAExecutionProvider") == providers.end()) {
        throw Failure(SD35_FAILED, "ONNX Runtime " + version +
                                       " has no CUDA provider — install the package for GPUs");
    }
    const OrtApi& api = Ort::GetApi();
    OrtCUDAProviderOptionsV2* made = nullptr;
    Ort::ThrowOnError(api.CreateCUDAProviderOptions(&made));
    const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api.ReleaseCUDAProviderOptions)> cuda(
        made, api.ReleaseCUDAProviderOptions);
    const std::string index = std::to_string(place.index);
    // Growing by powers of two would take twice the weights of a large component.
    const std::array<const char*, 2> keys{"device_id", "arena_extend_strategy"};
    const std::array<const char*, 2> values{index.c_str(), "kSameAsRequested"};
    Ort::ThrowOnError(
        api.UpdateCUDAProviderOptions(cuda.get(), keys.data(), values.data(), keys.size()));
    Ort::ThrowOnError(
        api.UpdateCUDAProviderOptionsWithValue(cuda.get(), "user_compute_stream", place.stream));
    options.AppendExecutionProvider_CUDA_V2(*cuda);
}

// As runtime/sessions/onnxruntime.py has them, for the same bits.
Ort::SessionOptions session_options(const sd35_plugin_engine& engine, const std::string& version) {
    Ort::SessionOptions options;
    options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_ERROR);
    // Laid out ahead as one block, a run's tensors are allocated beside those of the first run, and
    // take no less time.
    options.DisableMemPattern();
    // Each engine has threads of its own, which would spin on while the next one runs.
    options.AddConfigEntry("session.force_spinning_stop", "1");
    if (engine.threads != 0) options.SetIntraOpNumThreads(static_cast<int>(engine.threads));
    if (engine.fp8 != 0) {
        // Fusions of Q/DQ with the operators around them do not know FP8, and without them weights
        // would be folded into four times the bytes.
        options.AddConfigEntry("session.disable_quant_qdq", "1");
        options.AddConfigEntry("optimization.disable_specified_optimizers", "ConstantFolding");
    }
    if (engine.place.cuda != 0) append_cuda(options, engine.place, version);
    return options;
}

// On a GPU, what a component has worked with may be given back after a run; the denoiser keeps it.
Ort::RunOptions run_options(const sd35_plugin_engine& engine) {
    Ort::RunOptions options;
    if (engine.place.cuda != 0 && std::string_view(engine.component) != "denoiser") {
        const std::string device = "gpu:" + std::to_string(engine.place.index);
        options.AddConfigEntry("memory.enable_memory_arena_shrinkage", device.c_str());
    }
    return options;
}

Ort::Session open(Library& library, const sd35_plugin_engine& engine) {
    const Ort::SessionOptions options = session_options(engine, library.version());
    try {
        return Ort::Session(library.env(), engine.path, options);
    } catch (const Ort::Exception& error) {
        if (lacks_memory(error.what())) {
            throw Failure(SD35_OUT_OF_MEMORY, device_name(engine.place) + " has no room for " +
                                                  engine.component + " — load with a vram_budget");
        }
        throw Failure(SD35_BUNDLE, std::string(engine.path) + " cannot be loaded by ONNX Runtime " +
                                       library.version() + ": " + error.what() +
                                       " — build the bundle again with: sd35-trt build");
    }
}

}  // namespace

OnnxSession::OnnxSession(const sd35_plugin_engine& engine)
    : library_(Library::instance()),
      component_(engine.component),
      memory_(memory_of(engine.place)),
      run_options_(run_options(engine)),
      session_(open(library_, engine)) {}

void OnnxSession::run(const sd35_plugin_tensor* inputs, std::size_t input_count,
                      const sd35_plugin_tensor* outputs, std::size_t output_count) {
    try {
        Ort::IoBinding binding(session_);
        for (std::size_t i = 0; i < input_count; ++i) {
            binding.BindInput(inputs[i].name, value_of(inputs[i]));
        }
        for (std::size_t i = 0; i < output_count; ++i) {
            binding.BindOutput(outputs[i].name, value_of(outputs[i]));
        }
        // On a GPU it waits for the work: see runtime/sessions/onnxruntime.py.
        session_.Run(run_options_, binding);
    } catch (const Ort::Exception& error) {
        throw engine_failure(component_, "ONNX Runtime", error.what());
    }
}

Ort::Value OnnxSession::value_of(const sd35_plugin_tensor& tensor) const {
    return Ort::Value::CreateTensor(memory_, tensor.address, tensor.bytes, tensor.shape,
                                    static_cast<std::size_t>(tensor.rank),
                                    element_type(tensor.dtype));
}

}  // namespace libsd35::onnx
