// Calls of the CUDA runtime that throw where they fail.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "plugin/failure.hpp"

namespace libsd35::cuda {

// Throws Failure.
inline void check(cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next call would tell it again
    const std::string reason = cudaGetErrorString(status);
    if (status == cudaErrorMemoryAllocation) {
        throw Failure(SD35_OUT_OF_MEMORY,
                      "the GPU has no memory left (" + reason +
                          ") — draw a smaller size or batch, or load with a vram_budget");
    }
    throw Failure(SD35_FAILED, "CUDA failed: " + reason + " — check the driver with: nvidia-smi");
}

}  // namespace libsd35::cuda
