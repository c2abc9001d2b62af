// What every launcher does with CUDA's runtime: errors in words, and the device that it works on.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastlm {

// Every CUDA call goes through here, kernel launches with cudaGetLastError() as the code.
static inline void check(cudaError_t code, const std::string& doing) {
    if (code == cudaSuccess) return;
    throw std::runtime_error(
        "CUDA could not " + doing + ": " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")");
}

// Make `device` the current one while this lives.
class OnDevice {
public:
    explicit OnDevice(int device) {
        check(cudaGetDevice(&before_), "find the current device");
        check(cudaSetDevice(device), "use device " + std::to_string(device));
    }
    ~OnDevice() { cudaSetDevice(before_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
};

}  // namespace fastlm
