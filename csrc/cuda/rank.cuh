// SPDX-License-Identifier: MIT
// A source's rank is the number of sources that come before it: no sort, and ties need no care afterwards.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace tokred::cuda {

// Counts, of the keys that are numbered from `first` (a multiple of 4, as `size` is), those that come before number i
// with key `own`: the greater keys, and the equal ones of lower number. Looks at every `step`-th group of four.
__device__ __forceinline__ int32_t count_before(const uint32_t* keys, int first, int size, int start, int step,
                                                uint32_t own, int i) {
  int32_t before = 0;
#pragma unroll 4
  for (int k = 4 * start; k < size; k += 4 * step) {
    const uint4 four = *reinterpret_cast<const uint4*>(keys + k);
    const int number = first + k;
    // No key is the greatest integer, so "greater" is "at least one more", and one comparison serves both sides.
    const uint32_t threshold = own + (number + 3 >= i);
    before += (four.x >= threshold) + (four.y >= threshold) + (four.z >= threshold) + (four.w >= threshold);
    if (number / 4 == i / 4) {
      before += (number < i && four.x == own) + (number + 1 < i && four.y == own) + (number + 2 < i && four.z == own);
    }
  }
  return before;
}

}  // namespace tokred::cuda
