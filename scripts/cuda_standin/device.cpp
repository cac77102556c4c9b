// The GPU that the stand-in shows: an H100, which kernels are picked for. CUDA_VISIBLE_DEVICES=7 hides it, and
// CUDA_STANDIN_BYTES takes memory away.

#include "device.h"

#include <cstdlib>
#include <cstring>

namespace {

constexpr int kProcessors = 132, kThreads = 2048, kSharedBytes = 232448, kCacheBytes = 50 << 20;

bool is_visible() {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  return visible == nullptr || std::strcmp(visible, "0") == 0;
}

}  // namespace

size_t device_bytes() {
  const char* bytes = std::getenv("CUDA_STANDIN_BYTES");
  return bytes ? std::strtoull(bytes, nullptr, 10) : size_t{80} << 30;
}

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = is_visible();
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device) {
  if (!is_visible()) return cudaErrorNoDevice;
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* device, int) {
  *device = {};
  std::strcpy(device->name, "CUDA stand-in");
  device->major = 9;
  device->totalGlobalMem = device_bytes();
  device->multiProcessorCount = kProcessors;
  device->warpSize = 32;
  device->maxThreadsPerMultiProcessor = kThreads;
  device->maxThreadsPerBlock = device->maxThreadsDim[0] = device->maxThreadsDim[1] = 1024;
  device->maxThreadsDim[2] = 64;
  device->maxGridSize[0] = 0x7fffffff;
  device->maxGridSize[1] = device->maxGridSize[2] = 65535;
  device->sharedMemPerBlock = 49152;
  device->sharedMemPerBlockOptin = kSharedBytes;
  device->sharedMemPerMultiprocessor = kSharedBytes + 1024;
  device->regsPerBlock = device->regsPerMultiprocessor = 65536;
  return give(&device->l2CacheSize, kCacheBytes);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return give(value, 9);
    case cudaDevAttrComputeCapabilityMinor: return give(value, 0);
    case cudaDevAttrMultiProcessorCount: return give(value, kProcessors);
    case cudaDevAttrWarpSize: return give(value, 32);
    case cudaDevAttrMaxThreadsPerBlock: return give(value, 1024);
    case cudaDevAttrMaxThreadsPerMultiProcessor: return give(value, kThreads);
    case cudaDevAttrMaxSharedMemoryPerBlock: return give(value, 49152);
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return give(value, kSharedBytes);
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return give(value, kSharedBytes + 1024);
    case cudaDevAttrL2CacheSize: return give(value, kCacheBytes);
    default: return give(value, 1);
  }
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return give<void*>(function, nullptr);
}

}  // extern "C"
