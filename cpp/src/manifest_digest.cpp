#include "manifest_digest.hpp"

#include <nlohmann/json.hpp>

#include "error.hpp"
#include "files.hpp"
#include "python_json.hpp"
#include "sha256.hpp"

namespace libsd35 {
namespace {

constexpr const char* rebuild = "build it again with: sd35-trt build";

// Format 1 has the SHA-256 of the other fields, as Python's json.dumps writes them.
bool is_whole_1(nlohmann::json fields) {
    const auto digest = fields.find("digest");
    if (digest == fields.end() || !digest->is_string()) return false;
    const std::string expected = digest->get<std::string>();
    fields.erase(digest);
    return sha256(python_json(fields)) == expected;
}

bool is_whole_2(std::string_view data, const std::filesystem::path& root) {
    const std::filesystem::path path = root / "bundle.json.sha256";
    try {
        std::string expected = read_file(path, 256);
        if (!expected.empty() && expected.back() == '\n') expected.pop_back();
        return sha256(data) == expected;
    } catch (const FileError& error) {
        if (error.missing()) throw bundle_error(path.string() + " is missing", rebuild);
        throw bundle_error(path.string() + " cannot be read: " + error.what(), rebuild);
    }
}

}  // namespace

bool manifest_is_whole(std::string_view data, const nlohmann::json& document,
                       const std::filesystem::path& root) {
    if (document.at("format").get<int>() == 1) return is_whole_1(document);
    return is_whole_2(data, root);
}

}  // namespace libsd35
