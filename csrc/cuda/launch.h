// SPDX-License-Identifier: MIT
// Launch a kernel on a stream. A failure is an exception that names the op.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace tokred::cuda {

inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear the error, or the next caller of cudaGetLastError would see it
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

// Return the number of blocks as the grid's size. Throw if the grid cannot have so many.
inline unsigned grid_size(const char* op, int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(op) + ": too many rows for one launch");
  return static_cast<unsigned>(blocks);
}

// Shared memory that every kernel can use without a function attribute.
constexpr int kDefaultShared = 48 * 1024;
// Upper bound of the static shared memory in kernels that also use dynamic; both count against the limits.
constexpr int kReservedShared = 256;

// The most dynamic shared memory that a block can use on the current device, in bytes.
inline int shared_limit(const char* op) {
  int device = 0, bytes = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - kReservedShared;
}

// Allow the kernel all of the device's shared memory, once per kernel and device. The attribute belongs to the kernel,
// not to a launch: if each launch set its own size, one thread could lower it before another thread's launch.
inline void allow_large_shared(const char* op, const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  check(op, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return;
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit(op)));
  allowed.insert({kernel, device});
}

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > kDefaultShared - kReservedShared) {
    allow_large_shared(op, reinterpret_cast<const void*>(kernel));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_size(op, blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  // The status covers this launch. cudaGetLastError is not called after it: an error that another library left pending
  // is not this launch's, and its owner must still find it.
  check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace tokred::cuda
