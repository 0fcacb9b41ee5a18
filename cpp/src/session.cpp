#include "session.hpp"

#include "backends.hpp"
#include "error.hpp"
#include "plugin/loading.hpp"
#include "plugin/message.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

std::vector<sd35_plugin_tensor> tensors(const Feed& feed) {
    std::vector<sd35_plugin_tensor> result;
    for (const auto& [name, buffer] : feed) {
        // Names are literals, or the manifest's: they end with a NUL.
        result.push_back({name.data(), static_cast<std::int32_t>(buffer.dtype()),
                          static_cast<std::int32_t>(buffer.shape().size()), buffer.shape().data(),
                          buffer.address(), buffer.bytes()});
    }
    return result;
}

class PluginSession final : public Session {
  public:
    PluginSession(const sd35_plugin_backend& backend, Device& device,
                  const sd35_plugin_engine& engine)
        : backend_(backend), device_(device) {
        call_plugin([&](sd35_plugin_message* message) {
            return backend_.open(&engine, &session_, message);
        });
    }

    ~PluginSession() override {
        try {
            device_.synchronize();
        } catch (const std::exception&) {
            // Its last work failed, and was told as an error where it ran.
        }
        backend_.close(session_);
    }

    PluginSession(const PluginSession&) = delete;
    PluginSession& operator=(const PluginSession&) = delete;

    bool recordable() const override { return backend_.recordable != 0; }

    void run(const Feed& inputs, const Feed& outputs) override {
        const std::vector<sd35_plugin_tensor> read = tensors(inputs);
        const std::vector<sd35_plugin_tensor> written = tensors(outputs);
        call_plugin([&](sd35_plugin_message* message) {
            return backend_.run(session_, read.data(), read.size(), written.data(), written.size(),
                                message);
        });
    }

  private:
    const sd35_plugin_backend& backend_;
    Device& device_;
    void* session_ = nullptr;
};

std::string built_for(const Bundle& bundle) {
    const Manifest& manifest = bundle.manifest();
    const auto version = manifest.versions.find(manifest.builder);
    const std::string capabilities =
        manifest.compute_capabilities.empty() ? "?" : join(manifest.compute_capabilities);
    return "compute capability " + capabilities + " by " + std::string(backend_of(bundle).title) +
           " " + (version == manifest.versions.end() ? "?" : version->second);
}

}  // namespace

std::unique_ptr<Session> open_session(const Bundle& bundle, const Component& component,
                                      Device& device, const SessionOptions& options) {
    check_engines(bundle);
    const sd35_plugin_backend& backend = load_backend(*find_backend(component.engine));
    const std::string path = bundle.path(component.files.front().path).string();
    const std::string about = built_for(bundle);
    const auto fp8 = component.precisions.find("fp8");
    sd35_plugin_engine engine{};
    engine.component = component.name.c_str();
    engine.path = path.c_str();
    engine.built_for = about.c_str();
    engine.threads = options.threads;
    engine.fp8 = fp8 != component.precisions.end() && fp8->second != 0 ? 1 : 0;
    engine.streams = options.held_bytes ? 1 : 0;
    engine.held_bytes = options.held_bytes.value_or(0);
    engine.place = device.place();
    return std::make_unique<PluginSession>(backend, device, engine);
}

}  // namespace libsd35
