// Shared libraries beside libsd35, opened when they are needed.
#pragma once

#include "backends.hpp"
#include "plugin/interface.h"

namespace libsd35 {

// The functions of a kind of engine. The library is looked for in the directory that the
// environment variable SD35_BACKENDS names, where it is set, else in sd35/ beside libsd35; it stays
// open until the process ends. Throws Error; names what to install.
const sd35_plugin_backend& load_backend(const BackendRow& row);

}  // namespace libsd35
