// SPDX-License-Identifier: MIT
// Sums over lanes and blocks, always in the same order.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/sizes.h"

namespace tokred::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

// The sum over groups of kCount neighbouring lanes, a power of two; every lane of the group gets it.
template <int kCount, class V>
__device__ __forceinline__ V sum_of_lanes(V value) {
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) value += __shfl_xor_sync(kFullWarp, value, step);
  return value;
}

// The sum over all threads, which all must call it; every thread gets it.
template <int kThreads, class V>
__device__ __forceinline__ V block_sum(V value) {
  constexpr int kWarps = kThreads / kLanes;
  __shared__ V warp_sums[kWarps];
  value = sum_of_lanes<kLanes>(value);
  __syncthreads();  // the sums of a call before this one have been read
  if (threadIdx.x % kLanes == 0) warp_sums[threadIdx.x / kLanes] = value;
  __syncthreads();
  V sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += warp_sums[w];
  return sum;
}

// The sum of `value` over the threads before this one; `total` is that over all. All threads must call it.
template <int kThreads>
__device__ __forceinline__ int32_t exclusive_scan(int32_t value, int32_t& total) {
  constexpr int kWarps = kThreads / kLanes;
  __shared__ int32_t warp_sums[kWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  int32_t inclusive = value;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int32_t left = __shfl_up_sync(kFullWarp, inclusive, step);
    if (lane >= step) inclusive += left;
  }
  __syncthreads();  // the sums of a call before this one have been read
  if (lane == kLanes - 1) warp_sums[warp] = inclusive;
  __syncthreads();
  int32_t before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = total;
    total += warp_sums[w];
  }
  return before + inclusive - value;
}

}  // namespace tokred::cuda
