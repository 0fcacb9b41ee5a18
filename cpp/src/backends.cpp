#include "backends.hpp"

#include <algorithm>
#include <vector>

#include "error.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

std::string built_for(const Bundle& bundle) {
    return bundle.root().string() + " is built for " + bundle.manifest().target + " by " +
           bundle.manifest().builder;
}

Error unknown_engine(const Bundle& bundle, const std::string& engine) {
    std::vector<std::string> known;
    for (const BackendRow& row : backends) known.emplace_back(row.name);
    return bundle_error(
        built_for(bundle) + "; libsd35 runs no " + engine + " engines, but " + join(known),
        "build for this machine with: sd35-trt build --gpu cpu");
}

}  // namespace

const BackendRow* find_backend(std::string_view name) {
    const auto* const found = std::find_if(backends.begin(), backends.end(),
                                           [&](const BackendRow& row) { return row.name == name; });
    return found == backends.end() ? nullptr : found;
}

void check_engines(const Bundle& bundle) {
    backend_of(bundle);
    for (const Component& component : bundle.manifest().components) {
        if (find_backend(component.engine) == nullptr) {
            throw unknown_engine(bundle, component.engine);
        }
    }
}

const BackendRow& backend_of(const Bundle& bundle) {
    const BackendRow* row = find_backend(bundle.manifest().builder);
    if (row == nullptr) throw unknown_engine(bundle, bundle.manifest().builder);
    return *row;
}

std::string device_of(const Bundle& bundle, std::string_view asked) {
    check_engines(bundle);
    const BackendRow& row = backend_of(bundle);
    const std::string name(asked.empty() ? (row.on_cpu ? "cpu" : "cuda") : asked);
    const std::string kind = name.substr(0, name.find(':'));
    if ((kind == "cpu" && row.on_cpu) || (kind == "cuda" && row.on_cuda)) return name;
    const std::string kinds = !row.on_cpu ? "cuda" : row.on_cuda ? "cpu or cuda" : "cpu";
    throw bundle_error(built_for(bundle) + ", whose engines do not run on " + shown(name),
                       "use " + kinds + ", or build with: sd35-trt build --gpu " +
                           (name == "cpu" ? "cpu" : "auto"));
}

}  // namespace libsd35
