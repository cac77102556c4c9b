// A CUDA runtime for a machine without a GPU: device memory is memory of the host, copies are made, kernels do nothing,
// and all of it is counted. Under ONNX Runtime's own CUDA provider it shows where nodes are placed, which kernels are
// picked and what a CUDA graph holds; only the numbers are missing.
//
// Here are the functions that mean something, with `device.cpp`; `build.py` adds what else the provider calls, as
// functions that do nothing. NVIDIA's header checks the signatures. All streams are one.

#include "device.h"

#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <unordered_map>

namespace {

struct Copies {
  long count = 0;
  size_t bytes = 0, largest = 0;
};
struct Work {
  std::map<std::string, long> launches;  // by grid and kernel
  std::map<std::string, Copies> copies;  // by direction
};

std::mutex mutex;
Work done;                             // since standin_reset
Work* recorded = nullptr;              // while a graph is captured
std::map<std::string, long> replayed;  // launches by graphs
std::map<const char*, size_t> blocks;  // of device memory
size_t held = 0;                       // bytes of them

std::unordered_map<const void*, std::string>& kernel_names() {  // filled before this file's variables are made
  static auto* names = new std::unordered_map<const void*, std::string>;
  return *names;
}

cudaError_t unless_captured() { return recorded ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }

cudaError_t count_launch(const std::string& name, dim3 grid) {
  std::lock_guard lock(mutex);
  std::ostringstream line;
  line << grid.x << 'x' << grid.y << 'x' << grid.z << '\t' << name;
  ++(recorded ? *recorded : done).launches[line.str()];
  return cudaSuccess;
}
cudaError_t launch(const void* kernel, dim3 grid) {
  auto found = kernel_names().find(kernel);
  return count_launch(found == kernel_names().end() ? "unknown" : found->second, grid);
}
void name_kernel(const void* kernel, const char* mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  kernel_names()[kernel] = status == 0 ? text : mangled;
  std::free(text);
}

bool is_on_device(const void* address) {
  auto block = blocks.upper_bound(static_cast<const char*>(address));
  return block != blocks.begin() && address < (--block)->first + block->second;
}
void count_copy(const void* target, const void* source, size_t bytes) {
  std::lock_guard lock(mutex);
  auto place = [](const void* address) { return std::string(is_on_device(address) ? "device" : "host"); };
  Copies& copies = (recorded ? *recorded : done).copies[place(source) + " to " + place(target)];
  copies = {copies.count + 1, copies.bytes + bytes, std::max(copies.largest, bytes)};
}

}  // namespace

extern "C" {

// For the test that runs over this

void standin_reset() {
  done = {};
  replayed.clear();
}
const char* standin_report() {  // lines with tabs between their fields; valid until the next call
  static std::string text;
  std::ostringstream lines;
  for (const auto& [kernel, count] : done.launches) lines << "launch\t" << count << '\t' << kernel << '\n';
  for (const auto& [kernel, count] : replayed) lines << "replay\t" << count << '\t' << kernel << '\n';
  for (const auto& [direction, copies] : done.copies)
    lines << "copy\t" << copies.count << '\t' << copies.bytes << '\t' << copies.largest << '\t' << direction << '\n';
  return (text = lines.str()).c_str();
}
void standin_launch(const char* name) { count_launch(name, {0, 0, 0}); }  // by libraries whose grids are not known

// Memory

cudaError_t cudaMalloc(void** address, size_t bytes) {
  std::lock_guard lock(mutex);
  if (auto refused = unless_captured()) return refused;
  bytes = std::max<size_t>(bytes, 1);
  if (held + bytes > device_bytes()) return cudaErrorMemoryAllocation;
  *address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*address == MAP_FAILED) return cudaErrorMemoryAllocation;
  blocks[static_cast<char*>(*address)] = bytes;
  held += bytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* address) {
  std::lock_guard lock(mutex);
  auto block = blocks.find(static_cast<char*>(address));
  if (block == blocks.end()) return address ? cudaErrorInvalidValue : cudaSuccess;
  munmap(address, block->second);
  held -= block->second;
  blocks.erase(block);
  return cudaSuccess;
}
cudaError_t cudaMallocFromPoolAsync(void** to, size_t n, cudaMemPool_t, cudaStream_t) { return cudaMalloc(to, n); }
cudaError_t cudaFreeAsync(void* address, cudaStream_t) { return cudaFree(address); }
cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) { return give(to, aligned_alloc(256, (bytes | 255) + 1)); }
cudaError_t cudaMallocHost(void** to, size_t bytes) { return cudaHostAlloc(to, bytes, 0); }
cudaError_t cudaFreeHost(void* address) { return std::free(address), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* available, size_t* all) {
  *available = device_bytes() - held;
  return give(all, device_bytes());
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  std::lock_guard lock(mutex);
  *attributes = {};
  attributes->devicePointer = attributes->hostPointer = const_cast<void*>(address);
  return give(&attributes->type, is_on_device(address) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered);
}

// Copies

cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  count_copy(target, source, bytes);
  std::memmove(target, source, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
  if (auto refused = unless_captured()) return refused;
  return cudaMemcpyAsync(target, source, bytes, kind, nullptr);
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t) {
  count_copy(target, source, width * height);
  auto *to = static_cast<char*>(target), *of = static_cast<char*>(const_cast<void*>(source));
  for (; height > 0; --height, to += target_pitch, of += source_pitch) std::memmove(to, of, width);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) { return std::memset(to, value, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return cudaMemset(to, value, bytes); }

// Kernels. Compiled code registers each by the address of a function of the host, and launches it by that.

void** __cudaRegisterFatBinary(void* binary) { return new void*(binary); }
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  name_kernel(kernel, name);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return give(kernel, static_cast<cudaKernel_t>(const_cast<void*>(function)));
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  *kernel = reinterpret_cast<cudaKernel_t>(new char);
  return name_kernel(*kernel, name), cudaSuccess;
}

thread_local dim3 pushed_grid, pushed_block;  // by f<<<grid, block>>>()
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t, void*) {
  pushed_grid = grid;
  pushed_block = block;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = pushed_grid;
  *block = pushed_block;
  *static_cast<void**>(stream) = nullptr;
  return give<size_t>(shared_bytes, 0);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  return launch(kernel, grid);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  return launch(kernel, grid);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  return launch(kernel, grid);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return launch(kernel, config->gridDim);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t work, void* data) { return work(data), cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return give(&attributes->maxThreadsPerBlock, 1024);
}

// CUDA graphs: what is queued during a capture is done that once, as data do not matter, and counted at each replay.

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return give(&recorded, new Work); }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(recorded);
  return give<Work*>(&recorded, nullptr);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return give(status, recorded ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return give(executable, reinterpret_cast<cudaGraphExec_t>(graph));
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  const auto& graph = *reinterpret_cast<Work*>(executable);
  for (const auto& [kernel, count] : graph.launches) replayed[kernel] += count;
  for (const auto& [direction, more] : graph.copies) {
    Copies& copies = done.copies[direction];
    copies = {copies.count + more.count, copies.bytes + more.bytes, std::max(copies.largest, more.largest)};
  }
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return unless_captured(); }
cudaError_t cudaDeviceSynchronize() { return unless_captured(); }

}  // extern "C"
