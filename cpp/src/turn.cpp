#include "turn.hpp"

#include "error.hpp"

namespace libsd35 {

Turn::Hold Turn::take(const char* what) {
    if (is_held_here()) {
        throw usage_error(
            std::string(what) + " was called by a callback of the pipeline that is drawing",
            "return from the callback first; other than 0 cancels the request");
    }
    return Hold(*this);
}

}  // namespace libsd35
