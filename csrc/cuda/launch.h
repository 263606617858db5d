// SPDX-License-Identifier: MIT
// Launching a kernel on a stream, with its failure as an exception that names the op.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace tokred::cuda {

inline void check(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status));
}

// Blocks of one launch; more than the grid can number is an error, not a wrap.
inline unsigned grid_size(const char* op, int64_t blocks) {
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(op) + ": too many rows for one launch");
  return static_cast<unsigned>(blocks);
}

// A kernel takes this much dynamic shared memory without asking.
constexpr int kSharedWithoutAsking = 48 * 1024;
// Static shared memory, at most, of the kernels that also take dynamic (a scan's sums); the two share the limits.
constexpr int kReservedShared = 256;

template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > kSharedWithoutAsking - kReservedShared) {
    check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_size(op, blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(op, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  check(op, cudaGetLastError());
}

// The most dynamic shared memory that a block may ask for, in bytes.
inline int shared_limit(const char* op) {
  int device = 0, bytes = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - kReservedShared;
}

}  // namespace tokred::cuda
