// Whether a bundle's components have the ports that drawing reads and writes.
#pragma once

#include "bundle.hpp"

namespace libsd35 {

// Refuses a bundle whose components, ports or tokenizers are not those of docs/bundle-format.md,
// or do not fit each other; equal to sd35_trt/formats/contract.py. Throws Error.
void check_contract(const Bundle& bundle);

}  // namespace libsd35
