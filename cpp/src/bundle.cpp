#include "bundle.hpp"

#include <algorithm>
#include <set>
#include <system_error>

#include "error.hpp"
#include "files.hpp"
#include "text.hpp"

namespace libsd35 {
namespace {

namespace fs = std::filesystem;

// Files up to this size are hashed at every load, larger ones only on request.
constexpr std::uint64_t small_file = 32 << 20;

constexpr const char* rebuild = "build it again with: sd35-trt build";

// Whether a path lies in a directory once all links are followed.
bool lies_in(const fs::path& root, const fs::path& full) {
    std::error_code failure;
    const fs::path base = fs::canonical(root, failure);
    if (failure) return false;
    // A circle of links and a name too long are failures, too.
    const fs::path resolved = fs::weakly_canonical(full, failure);
    if (failure) return false;
    return std::mismatch(base.begin(), base.end(), resolved.begin(), resolved.end()).first ==
           base.end();
}

bool goes_up(const fs::path& path) {
    return std::any_of(path.begin(), path.end(), [](const fs::path& part) { return part == ".."; });
}

// Whether a link that leaves the bundle leads to a regular file with the content of `file`, as in
// the cache of Hugging Face's hub.
bool is_linked(const fs::path& root, const File& file) {
    const fs::path path(file.path);
    std::error_code failure;
    if (path.is_absolute() || goes_up(path) || !fs::is_symlink(root / path, failure)) return false;
    const fs::path target = fs::canonical(root / path, failure);
    if (failure) return false;
    try {
        RegularFile content(target);
        if (content.size() != file.bytes) return false;
        // The cache names large files by their SHA-256, and checks it.
        const bool named = target.filename() == file.sha256 && content.size() > small_file;
        return named || sha256_of(content) == file.sha256;
    } catch (const FileError&) {
        return false;
    }
}

void check_content(const fs::path& path, const File& expected, bool verify) {
    std::error_code failure;
    if (!fs::exists(path, failure)) throw bundle_error(path.string() + " is missing", rebuild);
    if (!fs::is_regular_file(path, failure)) {
        throw bundle_error(path.string() + " is no regular file", rebuild);
    }
    try {
        RegularFile file(path);
        if (file.size() != expected.bytes) {
            throw bundle_error(path.string() + " has " + grouped(file.size()) +
                                   " bytes, the manifest says " + grouped(expected.bytes),
                               rebuild);
        }
        if ((verify || file.size() <= small_file) && sha256_of(file) != expected.sha256) {
            throw bundle_error(path.string() + " is damaged (SHA-256 differs)", rebuild);
        }
    } catch (const FileError& error) {
        throw bundle_error(path.string() + " cannot be read: " + error.what(), rebuild);
    }
}

}  // namespace

Bundle::Bundle(const fs::path& root, bool verify) : root_(root), manifest_(read_manifest(root)) {
    for (const File& file : manifest_.files) check(file, verify);
    std::set<std::string> seen;
    for (const Component& component : manifest_.components) {
        for (const File& file : component.files) {
            if (seen.insert(file.path).second) check(file, verify);
        }
    }
    for (const auto& [_, tokenizer] : manifest_.tokenizers) path(tokenizer.path);
}

void Bundle::check(const File& file, bool verify) {
    if (!lies_in(root_, root_ / file.path) && is_linked(root_, file)) links_.insert(file.path);
    check_content(path(file.path), file, verify);
}

fs::path Bundle::path(const std::string& relative) const {
    if (links_.find(relative) != links_.end()) return root_ / relative;
    const fs::path path(relative);
    if (path.is_absolute() || goes_up(path) || !lies_in(root_, root_ / path)) {
        throw bundle_error((root_ / "bundle.json").string() + ": the path " + shown(relative) +
                               " leaves the bundle",
                           "do not use this bundle");
    }
    return root_ / path;
}

std::string Bundle::read(const std::string& relative, std::uint64_t limit) const {
    const fs::path file = path(relative);
    try {
        return read_file(file, limit);
    } catch (const FileError& error) {
        throw bundle_error(file.string() + " cannot be read: " + error.what(), rebuild);
    }
}

}  // namespace libsd35
