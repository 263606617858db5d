// SPDX-License-Identifier: MIT
// Stands in for CUDA's header of this name when the kernels are compiled for the host by a plain C++ compiler: the
// qualifiers, built-in variables, warp and block functions that csrc/cuda uses, on top of emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulator.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// Blocks run one after another, so one copy serves them all.
#define __shared__ static

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned size) : x(size) {}
};

#define threadIdx (emulation::device().thread)
#define blockIdx (emulation::device().block)

using std::max;
using std::min;

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address += value;
  return old;
}

inline void __syncthreads() { emulation::device().block_barrier(0); }
inline int __syncthreads_or(int predicate) { return emulation::device().block_barrier(predicate) != 0; }
inline int __syncthreads_count(int predicate) { return emulation::device().block_barrier(predicate); }
inline void __syncwarp() { emulation::warp_barrier(); }

namespace emulation {

// `pick(lane)` names the lane whose value is wanted.
template <class T, class Pick>
T shuffle(unsigned mask, T value, Pick pick) {
  return exchange<T, T>(mask, value, [&](const T* all, int lane) {
    const int from = pick(lane);
    return all[from >= 0 && from < kLanes ? from : lane];
  });
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  return emulation::shuffle(mask, value, [=](int lane) { return lane ^ step; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
  return emulation::shuffle(mask, value, [=](int lane) { return lane - step; });
}
inline int __any_sync(unsigned mask, int predicate) {
  return emulation::exchange<int, int>(mask, predicate, [](const int* all, int) {
    return static_cast<int>(std::any_of(all, all + emulation::kLanes, [](int one) { return one != 0; }));
  });
}
inline unsigned __match_any_sync(unsigned mask, int value) {
  return emulation::exchange<int, unsigned>(mask, value, [](const int* all, int lane) {
    unsigned peers = 0;
    for (int other = 0; other < emulation::kLanes; ++other) peers |= unsigned{all[other] == all[lane]} << other;
    return peers;
  });
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulation::device().shared_limit, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return std::memset(memory, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const size_t used = config->dynamicSmemBytes + emulation::kStaticShared;
  if (used > static_cast<size_t>(emulation::device().shared_limit)) return cudaErrorInvalidValue;
  emulation::device().launch(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                             [&] { kernel(arguments...); });
  return cudaSuccess;
}
