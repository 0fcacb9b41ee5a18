// Shared libraries beside libsd35, opened when they are needed.
#pragma once

#include "backends.hpp"
#include "plugin/interface.h"

namespace libsd35 {

// They are looked for in the directory that the environment variable SD35_BACKENDS names, where it
// is set, else in sd35/ beside libsd35, and stay open until the process ends. Both throw Error;
// it names what to install.

// The functions of a kind of engine.
const sd35_plugin_backend& load_backend(const BackendRow& row);

// The functions of GPUs.
const sd35_plugin_device& load_gpu();

}  // namespace libsd35
