// SPDX-License-Identifier: MIT
// Sorting by one block.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tokred::cuda {

// Sorts different values from high to low, in shared or in global memory (a pointer, or what gives and takes uint64_t
// by index as one does), by a bitonic network whose every comparison puts the greater value in front. What a power of
// two lacks would be zeros at the end, which no comparison moves, so they need not be there. Starts and ends with a
// barrier.
template <int kThreads, class Values>
__device__ __forceinline__ void sort_descending(Values values, int32_t size) {
  auto order = [&](int32_t front, int32_t back) {
    if (back >= size) return;
    const uint64_t a = values[front], b = values[back];
    if (a < b) values[front] = b, values[back] = a;
  };
  __syncthreads();
  for (int32_t half = 1; half < size; half *= 2) {
    // Two sorted runs of `half` values, the second in reverse, are a bitonic sequence.
    const int32_t pairs = (size + 2 * half - 1) / (2 * half) * half;
    for (int32_t k = threadIdx.x; k < pairs; k += kThreads) {
      const int32_t place = k & (half - 1), run = 2 * (k - place);
      order(run + place, run + 2 * half - 1 - place);
    }
    __syncthreads();
    for (int32_t step = half / 2; step > 0; step /= 2) {
      for (int32_t k = threadIdx.x; k < pairs; k += kThreads) {
        const int32_t place = k & (step - 1);
        order(2 * k - place, 2 * k - place + step);
      }
      __syncthreads();
    }
  }
}

}  // namespace tokred::cuda
