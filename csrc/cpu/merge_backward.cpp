// SPDX-License-Identifier: MIT
// The gradients of merge; see MergeBackwardArgs for the formulas. For sums and means it is a gather along dest, an
// input row at a time; for maxima the slot's owner counts the ties and writes its members.
#include <algorithm>

#include "copy_row.h"
#include "element.h"
#include "for_each.h"
#include "maps.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T>
void clear_gradients(const MergeBackwardArgs& a, int64_t row) {
  using Sum = typename Element<T>::Sum;
  if (a.grad_x) clear_row(static_cast<T*>(a.grad_x) + row * a.channels, a.channels * sizeof(T));
  if (a.grad_weight) static_cast<Sum*>(a.grad_weight)[row] = 0;
}

// g, scaled, for one row of a sum or a mean.
template <class T>
void gather_row(const MergeBackwardArgs& a, int64_t row) {
  using E = Element<T>;
  using Sum = typename E::Sum;
  const int32_t slot = a.dest[row];
  if (slot < 0) return clear_gradients<T>(a, row);
  if (slot >= a.num_out) throw_bad_index("dest", slot, -1, a.num_out);

  const int64_t out = row / a.tokens * a.num_out + slot;
  const Sum* weight = static_cast<const Sum*>(a.weight);
  const Sum w = weight ? weight[row] : Sum(1);
  const Sum total = a.reduce == Reduce::sum ? Sum(1)
                    : weight                ? static_cast<const Sum*>(a.weight_sum)[out]
                                            : static_cast<Sum>(a.count[out]);
  const Sum* grad_total = static_cast<const Sum*>(a.grad_weight_sum);
  const Sum from_total = grad_total ? grad_total[out] : Sum(0);
  if (a.reduce == Reduce::mean && total == 0) {  // the mean is 0 whatever the row holds
    clear_gradients<T>(a, row);
    if (a.grad_weight) static_cast<Sum*>(a.grad_weight)[row] = from_total;
    return;
  }
  const T* g = static_cast<const T*>(a.grad_y) + out * a.channels;
  if (a.grad_x) {
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.channels;
    const Sum scale = w / total;
    if (scale == 1) {
      copy_row(grad_x, g, a.channels * sizeof(T));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < a.channels; ++c) grad_x[c] = E::store(scale * E::load(g[c]));
    }
  }
  if (a.grad_weight) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    Sum dot = 0;
    if (a.reduce == Reduce::mean) {
      const T* y = static_cast<const T*>(a.y) + out * a.channels;
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < a.channels; ++c) dot += (E::load(x[c]) - E::load(y[c])) * E::load(g[c]);
    } else {
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < a.channels; ++c) dot += E::load(x[c]) * E::load(g[c]);
    }
    static_cast<Sum*>(a.grad_weight)[row] = dot / total + from_total;
  }
}

// The gradient of one slot's maximum, divided evenly between the members that have it.
template <class T>
void split_slot(const MergeBackwardArgs& a, int64_t out) {
  using E = Element<T>;
  using Sum = typename E::Sum;
  const int32_t* members = a.members + a.begin[out];
  const int32_t count = a.count[out];
  check_members(members, count);
  const T* x = static_cast<const T*>(a.x);
  const T* y = static_cast<const T*>(a.y) + out * a.channels;
  const T* g = static_cast<const T*>(a.grad_y) + out * a.channels;
  T* grad_x = static_cast<T*>(a.grad_x);
  const auto ties = [](Sum value, Sum best) { return Sum((value == best) | ((value != value) & (best != best))); };
  for (int64_t start = 0; start < a.channels; start += kChannelBlock) {
    const int64_t n = std::min(kChannelBlock, a.channels - start);
    Sum number[kChannelBlock];
    std::fill(number, number + n, Sum(0));
    for (int32_t m = 0; m < count; ++m) {
      const T* values = x + members[m] * a.x_stride + start;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) number[c] += ties(E::load(values[c]), E::load(y[start + c]));
    }
    for (int32_t m = 0; m < count; ++m) {
      const T* values = x + members[m] * a.x_stride + start;
      T* grad = grad_x + members[m] * a.channels + start;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const bool tie = ties(E::load(values[c]), E::load(y[start + c])) != 0;
        grad[c] = E::store(tie ? E::load(g[start + c]) / number[c] : Sum(0));
      }
    }
  }
}

}  // namespace

void merge_backward(const MergeBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t rows = a.images * a.tokens;
    const bool parallel = rows * a.channels * static_cast<int64_t>(sizeof(T)) > kSerialBytes;
    if (a.reduce != Reduce::amax) {
      for_each(rows, parallel, [&](int64_t row) { gather_row<T>(a, row); });
      return;
    }
    if (!a.grad_x) return;
    check_slots_and_members(a, rows, a.images * a.num_out);
    for_each(a.images * a.num_out, parallel, [&](int64_t out) { split_slot<T>(a, out); });
    for_each(rows, parallel, [&](int64_t row) {
      if (a.dest[row] < 0) clear_gradients<T>(a, row);
    });
  });
}

TOKRED_KERNELS_END
