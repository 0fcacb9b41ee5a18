// An opened bundle: a directory whose files are as the manifest says.
#pragma once

#include <filesystem>
#include <set>
#include <string>

#include "manifest.hpp"

namespace libsd35 {

class Bundle {
  public:
    // Reads the manifest and checks the files behind it: sizes always, hashes of small files
    // always, of large ones where `verify` says so. Throws Error.
    Bundle(const std::filesystem::path& root, bool verify);

    const std::filesystem::path& root() const noexcept { return root_; }
    const Manifest& manifest() const noexcept { return manifest_; }

    // Path of a file of the bundle. Throws Error where it leaves the bundle, unless it is a link
    // whose target was seen to have the manifest's hash.
    std::filesystem::path path(const std::string& relative) const;

    // Content of a file of at most so many bytes. Throws Error.
    std::string read(const std::string& relative, std::uint64_t limit) const;

  private:
    void check(const File& file, bool verify);

    std::filesystem::path root_;
    Manifest manifest_;
    std::set<std::string, std::less<>> links_;
};

}  // namespace libsd35
