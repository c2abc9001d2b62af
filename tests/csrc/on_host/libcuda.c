/* A driver of a GPU that is not there: it answers what Triton asks of one like an H100's, and instead of launching a
kernel keeps what the launch was given. Built as libcuda.so.1 by test_triton_launch.py, with the cuda.h of Triton's own
package. */
#include <stdint.h>
#include <string.h>

#include "cuda.h"

enum { MOST = 256 };

int launches = 0;
int parameters = 0;          // of the next launch, to be set before
int sizes[MOST];             // in bytes, likewise
uint64_t values[MOST];       // of the last launch
unsigned grid[3], threads, shared_memory;

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** given, void** extra) {
    (void)function, (void)extra;
    for (int i = 0; i < parameters; i++) {
        values[i] = 0;
        memcpy(&values[i], given[i], sizes[i]);
    }
    grid[0] = config->gridDimX;
    grid[1] = config->gridDimY;
    grid[2] = config->gridDimZ;
    threads = config->blockDimX;
    shared_memory = config->sharedMemBytes;
    launches++;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
        case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        default: *value = 65536;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    (void)function;
    *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    (void)attribute;
    memcpy(value, &pointer, sizeof pointer);
    return CUDA_SUCCESS;
}

// The rest says yes.
#define HANDLE(type) ((type)(uintptr_t)8)
CUresult cuInit(unsigned flags) { return (void)flags, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    return (void)device, *context = HANDLE(CUcontext), CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = HANDLE(CUcontext), CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return (void)limit, *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return (void)image, *module = HANDLE(CUmodule), CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
    return (void)module, (void)name, *f = HANDLE(CUfunction), CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
    return (void)f, (void)attribute, (void)value, CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return (void)f, (void)config, CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
    return (void)stream, *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
    return (void)error, *text = "an error of a driver that has none", CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute* attributes, void** data, CUdeviceptr pointer) {
    return (void)n, (void)attributes, (void)data, (void)pointer, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* config) {
    return (void)f, (void)config, *n = 1, CUDA_SUCCESS;
}
