// SPDX-License-Identifier: MIT
// Stands in for CUDA's header of this name when the kernels are compiled for the host by a plain C++ compiler: the
// qualifiers, built-in variables, warp and block functions that csrc/cuda uses, on top of emulator.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <utility>

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

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
};
struct cudaFuncAttributes {};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {

// Dynamic shared memory that a kernel can use without the function attribute.
constexpr int kDefaultShared = 48 * 1024 - static_cast<int>(kStaticShared);

// The runtime's state; tests set and read it.
struct Runtime {
  cudaError_t last_error = cudaSuccess;
  cudaError_t load_status = cudaSuccess;  // of cudaFuncGetAttributes
  int driver = 13000, version = 13000, capability = 90;
  std::map<std::pair<const void*, int>, int> shared;  // the attribute of each kernel on each device
  int attribute_calls = 0;
  std::function<void()> before_launch;  // runs once, at the start of the next launch

  cudaError_t report(cudaError_t status) {
    if (status != cudaSuccess) last_error = status;
    return status;
  }
};
inline Runtime& runtime() {
  static Runtime the_runtime;
  return the_runtime;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t status) {
  return status == cudaErrorInvalidValue ? "invalid argument" : "another error";
}
inline cudaError_t cudaGetLastError() { return std::exchange(emulation::runtime().last_error, cudaSuccess); }
// A real device has one limit, so each shared_limit stands for another device and is its number.
inline cudaError_t cudaGetDevice(int* device) { return *device = emulation::device().shared_limit, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const int capability = emulation::runtime().capability;
  *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device
           : attribute == cudaDevAttrComputeCapabilityMajor     ? capability / 10
                                                                : capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = emulation::runtime().driver, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = emulation::runtime().version, cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return std::memset(memory, value, bytes), cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return emulation::runtime().report(emulation::runtime().load_status);
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  emulation::Runtime& r = emulation::runtime();
  const int limit = emulation::device().shared_limit;
  ++r.attribute_calls;
  if (bytes + static_cast<int>(emulation::kStaticShared) > limit) return r.report(cudaErrorInvalidValue);
  return r.shared[{kernel, limit}] = bytes, cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  emulation::Runtime& r = emulation::runtime();
  if (const auto hook = std::exchange(r.before_launch, nullptr)) hook();
  const auto allowed = r.shared.find({reinterpret_cast<const void*>(kernel), emulation::device().shared_limit});
  const int limit = allowed == r.shared.end() ? emulation::kDefaultShared : allowed->second;
  if (config->dynamicSmemBytes > static_cast<size_t>(limit)) return r.report(cudaErrorInvalidValue);
  emulation::device().launch(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes,
                             [&] { kernel(arguments...); });
  return cudaSuccess;
}
