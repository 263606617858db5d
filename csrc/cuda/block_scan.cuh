// SPDX-License-Identifier: MIT
// Running sums over a block.
#pragma once

#include <cstdint>

#include "../common/sizes.h"

namespace tokred::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

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
