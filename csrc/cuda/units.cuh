// SPDX-License-Identifier: MIT
// Rows in units of 16 bytes, whatever their alignment: which lane has which elements, and so the order of every sum,
// does not depend on where a row starts.
#pragma once

#include "../common/sizes.h"
#include "dtype.cuh"

namespace tokred::cuda {

template <class T>
constexpr int kUnitElements = kUnitBytes / static_cast<int>(sizeof(T));

template <class T>
using Unit = Vector<T, kUnitElements<T>>;

// Loads the next elements from `from`, with zeros past the `left` that remain in the row. `aligned` says that `from` is
// a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ Unit<T> load_unit(const T* from, int left, bool aligned) {
  constexpr int kElements = kUnitElements<T>;
  Unit<T> v;
  v.word = make_uint4(0, 0, 0, 0);
  if (left <= 0) return v;
  if (aligned && left >= kElements) {
    v.word = __ldg(reinterpret_cast<const uint4*>(from));
  } else {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (e < left) v.element[e] = from[e];
    }
  }
  return v;
}

// The same, where `kWhole` says that rows start and end at multiples of 16 bytes; then it is one instruction.
template <bool kWhole, class T>
__device__ __forceinline__ Unit<T> load_row_unit(const T* from, int left) {
  if constexpr (!kWhole) return load_unit(from, left, false);
  Unit<T> v;
  v.word = make_uint4(0, 0, 0, 0);
  if (left > 0) v.word = __ldg(reinterpret_cast<const uint4*>(from));
  return v;
}

}  // namespace tokred::cuda
