// SPDX-License-Identifier: MIT
// Merge: every output row is owned by one thread and summed over its members in order, so the result never depends on
// the number of threads.
#include <algorithm>
#include <cmath>

#include "copy_row.h"
#include "element.h"
#include "for_each.h"
#include "maps.h"

TOKRED_KERNELS_BEGIN
namespace {

// True if the result of a single member is a copy: a mean unless the weight is 0, infinite or NaN; a sum if it is 1.
template <Reduce kReduce, class Sum>
bool is_copy(Sum weight) {
  return kReduce == Reduce::mean ? weight != 0 && std::isfinite(weight) : weight == 1;
}

// One output row from `count` members whose weights sum to `total`; not inline, so that copies stay a short loop.
template <class T, Reduce kReduce>
__attribute__((noinline)) void reduce_members(const MergeArgs& a, const int32_t* members, int32_t count,
                                              typename Element<T>::Sum total, T* y) {
  using E = Element<T>;
  using Sum = typename E::Sum;
  const T* x = static_cast<const T*>(a.x);
  const Sum* weight = static_cast<const Sum*>(a.weight);
  for (int64_t start = 0; start < a.channels; start += kChannelBlock) {
    const int64_t n = std::min(kChannelBlock, a.channels - start);
    Sum sums[kChannelBlock];
    std::fill(sums, sums + n, Sum(0));
    for (int32_t m = 0; m < count; ++m) {
      const T* values = x + members[m] * a.x_stride + start;
      if constexpr (kReduce == Reduce::amax) {
        if (m == 0) {
#pragma omp simd
          for (int64_t c = 0; c < n; ++c) sums[c] = E::load(values[c]);
        } else {
#pragma omp simd
          for (int64_t c = 0; c < n; ++c) {
            const Sum value = E::load(values[c]);
            // A NaN replaces a number, and no number replaces a NaN.
            sums[c] = (value > sums[c]) | (value != value) ? value : sums[c];
          }
        }
      } else if (weight) {
        const Sum w = weight[members[m]];
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) sums[c] += w * E::load(values[c]);
      } else {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) sums[c] += E::load(values[c]);
      }
    }
    const Sum divisor = kReduce == Reduce::mean ? total : Sum(1);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) y[start + c] = E::store(sums[c] / divisor);
  }
}

template <class T, Reduce kReduce>
void reduce_row(const MergeArgs& a, int64_t row) {
  using Sum = typename Element<T>::Sum;
  const Sum* weight = static_cast<const Sum*>(a.weight);
  T* y = static_cast<T*>(a.y) + row * a.channels;
  const int32_t* members = a.members + a.begin[row];
  const int32_t count = a.count[row];
  check_members(members, count);

  Sum total = static_cast<Sum>(count);
  if (weight) {
    total = 0;
    for (int32_t m = 0; m < count; ++m) total += weight[members[m]];
  }
  if (a.weight_sum) static_cast<Sum*>(a.weight_sum)[row] = total;

  if (count == 1 && (!weight || is_copy<kReduce>(total))) {
    copy_row(y, static_cast<const T*>(a.x) + members[0] * a.x_stride, a.channels * sizeof(T));
  } else if (kReduce == Reduce::mean && total == 0) {  // nothing has a weight
    clear_row(y, a.channels * sizeof(T));
  } else {
    reduce_members<T, kReduce>(a, members, count, total, y);
  }
}

template <class T, Reduce kReduce>
void merge_rows(const MergeArgs& a) {
  const bool parallel = a.rows_out * a.channels * static_cast<int64_t>(sizeof(T)) > kSerialBytes;
  for_each(a.rows_out, parallel, [&](int64_t row) { reduce_row<T, kReduce>(a, row); });
}

}  // namespace

void merge(const MergeArgs& a) {
  check_slots_and_members(a, a.rows_in, a.rows_out);
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    switch (a.reduce) {
      case Reduce::sum:
        return merge_rows<T, Reduce::sum>(a);
      case Reduce::mean:
        return merge_rows<T, Reduce::mean>(a);
      case Reduce::amax:
        return merge_rows<T, Reduce::amax>(a);
    }
  });
}

TOKRED_KERNELS_END
