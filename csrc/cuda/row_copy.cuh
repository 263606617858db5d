// SPDX-License-Identifier: MIT
// Functions that merge, unmerge and their gradients share: a thread's row and vectors, and their loads and stores.
#pragma once

#include "../common/row_config.h"
#include "block_scan.cuh"
#include "dtype.cuh"
#include "launch.h"

namespace tokred::cuda {

// Lanes are numbered inside their group of 1, 2, ... 32; a group has one row.
struct RowGroup {
  int lanes, lane, group;
  int64_t row;

  __device__ __forceinline__ explicit RowGroup(const RowConfig& c)
      : lanes(1 << c.lanes_log2),
        lane(threadIdx.x & (lanes - 1)),
        group(threadIdx.x >> c.lanes_log2),
        row(static_cast<int64_t>(blockIdx.x) * c.rows_per_block + group) {}
};

// Every row is read by one group and written by one, so neither should push others' data out of the caches first.
template <class T, int kElements>
__device__ __forceinline__ Vector<T, kElements> load_vector(const T* row, int vector) {
  Vector<T, kElements> v;
  v.word = __ldg(reinterpret_cast<const typename Vector<T, kElements>::Word*>(row) + vector);
  return v;
}

template <class T, int kElements>
__device__ __forceinline__ void store_vector(T* row, int vector, const Vector<T, kElements>& v) {
  __stcs(reinterpret_cast<typename Vector<T, kElements>::Word*>(row) + vector, v.word);
}

// target = factor * source, or zeros where source is null. A factor of 1 copies. All loads come before the factor is
// looked at, so that the memory behind it is read at the same time.
template <class T, int kElements>
__device__ __forceinline__ void move_row(const RowGroup& g, const RowConfig& c, const T* source, Acc<T> factor,
                                         T* target) {
  for (int first = g.lane; first < c.vectors; first += g.lanes * kInFlight) {
    Vector<T, kElements> v[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int vector = first + k * g.lanes;
      v[k].word = {};
      if (source && vector < c.vectors) v[k] = load_vector<T, kElements>(source, vector);
    }
    if (source && !(factor == Acc<T>(1))) {
#pragma unroll
      for (int k = 0; k < kInFlight; ++k) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) v[k].element[e] = narrow<T>(factor * widen(v[k].element[e]));
      }
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int vector = first + k * g.lanes;
      if (vector < c.vectors) store_vector(target, vector, v[k]);
    }
  }
}

// Calls f(zero of T, the number of elements in a vector as a constant) for the vector width that `c` chose.
template <class T, class F>
void with_width(const RowConfig& c, F&& f) {
  constexpr int kSize = sizeof(T);
  if (c.vector_bytes == kWideBytes) return f(std::integral_constant<int, kWideBytes / kSize>{});
  if constexpr (kSize < kNarrowBytes) {
    if (c.vector_bytes == kNarrowBytes) return f(std::integral_constant<int, kNarrowBytes / kSize>{});
  }
  f(std::integral_constant<int, 1>{});
}

inline uintptr_t address(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

}  // namespace tokred::cuda
