// libFuzzer on the manifest: whatever its bytes, it is read or refused by an Error.
#include <sys/types.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "error.hpp"
#include "manifest.hpp"
#include "sha256.hpp"

namespace {

std::filesystem::path make_folder() {
    std::string name = (std::filesystem::temp_directory_path() / "manifest-fuzz-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    return name;
}

void write(const std::filesystem::path& path, std::string_view text) {
    std::ofstream(path, std::ios::binary) << text;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    static const std::filesystem::path folder = make_folder();
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    write(folder / "bundle.json", text);
    // Who makes a hostile bundle signs it, too.
    write(folder / "bundle.json.sha256", libsd35::sha256(text) + "\n");
    try {
        libsd35::read_manifest(folder);
    } catch (const libsd35::Error& error) {
        if (error.message().find('\n') != std::string::npos) std::abort();
    }
    return 0;
}
