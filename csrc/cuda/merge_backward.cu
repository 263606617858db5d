// SPDX-License-Identifier: MIT
// The gradients of merge. Those of sums and means are a gather: a group of lanes owns a token and reads its slot's
// gradient. That of the maximum is owned by the slot, which has to count the members that share each maximum.
#include "ops.h"
#include "row_copy.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "merge_backward";

// Vectors of each of x, y and the gradient that a lane has in flight for its dot product.
constexpr int kDotsInFlight = 2;

template <class T>
__device__ __forceinline__ const T* row_of(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

// <x, g>, or <x - y, g>, over the vectors of one lane.
template <class T, int kElements>
__device__ __forceinline__ Acc<T> lane_dot(const RowGroup& g, const RowConfig& c, const T* x, const T* y,
                                           const T* grad) {
  Acc<T> dot = 0;
  for (int first = g.lane; first < c.vectors; first += g.lanes * kDotsInFlight) {
    Vector<T, kElements> a[kDotsInFlight], b[kDotsInFlight], d[kDotsInFlight];
#pragma unroll
    for (int k = 0; k < kDotsInFlight; ++k) {
      const int vector = first + k * g.lanes;
      const bool present = vector < c.vectors;
      a[k].word = b[k].word = d[k].word = {};
      if (present) a[k] = load_vector<T, kElements>(x, vector);
      if (present && y) b[k] = load_vector<T, kElements>(y, vector);
      if (present) d[k] = load_vector<T, kElements>(grad, vector);
    }
#pragma unroll
    for (int k = 0; k < kDotsInFlight; ++k) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        dot += (widen(a[k].element[e]) - widen(b[k].element[e])) * widen(d[k].element[e]);
      }
    }
  }
  return dot;
}

template <class T, int kElements>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    linear_backward(const __grid_constant__ MergeBackwardArgs args, const __grid_constant__ RowConfig c) {
  using A = Acc<T>;
  const RowGroup g(c);
  const bool present = g.row < args.images * args.tokens;
  const int32_t dest = present ? args.dest[g.row] : -1;
  const int64_t slot = present ? g.row / args.tokens * args.num_out + dest : 0;
  const bool mean = args.reduce == Reduce::mean;

  A weight = 1, total = 1;
  if (dest >= 0) {
    if (args.weight) weight = static_cast<const A*>(args.weight)[g.row];
    if (mean) total = args.weight ? static_cast<const A*>(args.weight_sum)[slot] : static_cast<A>(args.count[slot]);
  }
  // The mean of a slot whose weights sum to 0 is 0, whatever its members hold.
  const T* grad = dest < 0 || total == 0 ? nullptr : row_of<T>(args.grad_y, slot, args.channels);
  if (args.grad_x && present) {
    T* grad_x = static_cast<T*>(args.grad_x) + g.row * args.channels;
    const A factor = mean ? weight / total : weight;
    move_row<T, kElements>(g, c, grad, factor, grad_x);
  }
  if (!args.grad_weight) return;

  A dot = 0;
  if (grad) {
    const T* y = mean ? row_of<T>(args.y, slot, args.channels) : nullptr;
    dot = lane_dot<T, kElements>(g, c, row_of<T>(args.x, g.row, args.x_stride), y, grad);
  }
  for (int step = g.lanes / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kFullWarp, dot, step);
  if (present && g.lane == 0) {
    const A from_sum = dest >= 0 && args.grad_weight_sum ? static_cast<const A*>(args.grad_weight_sum)[slot] : A(0);
    static_cast<A*>(args.grad_weight)[g.row] = (grad ? dot / total : A(0)) + from_sum;
  }
}

// The gradient of the maximum for the members of one slot, each channel's shared by the members that reach it.
template <class T, int kElements>
__device__ __forceinline__ void share_maximum(const MergeBackwardArgs& args, const RowConfig& c, const RowGroup& g) {
  using A = Acc<T>;
  const int32_t* members = args.members + args.begin[g.row];
  const int32_t count = args.count[g.row];
  const T* grad = row_of<T>(args.grad_y, g.row, args.channels);
  const T* y = row_of<T>(args.y, g.row, args.channels);
  T* grad_x = static_cast<T*>(args.grad_x);
  if (count == 1) {
    move_row<T, kElements>(g, c, grad, A(1), grad_x + members[0] * args.channels);
    return;
  }
  auto reaches = [](A value, A maximum) { return value == maximum || (value != value && maximum != maximum); };
  for (int vector = g.lane; vector < c.vectors; vector += g.lanes) {
    const Vector<T, kElements> maximum = load_vector<T, kElements>(y, vector);
    int32_t ties[kElements] = {};
    for (int32_t m = 0; m < count; ++m) {
      const Vector<T, kElements> v = load_vector<T, kElements>(row_of<T>(args.x, members[m], args.x_stride), vector);
#pragma unroll
      for (int e = 0; e < kElements; ++e) ties[e] += reaches(widen(v.element[e]), widen(maximum.element[e]));
    }
    Vector<T, kElements> part = load_vector<T, kElements>(grad, vector);
#pragma unroll
    for (int e = 0; e < kElements; ++e) part.element[e] = narrow<T>(widen(part.element[e]) / static_cast<A>(ties[e]));
    for (int32_t m = 0; m < count; ++m) {
      Vector<T, kElements> v = load_vector<T, kElements>(row_of<T>(args.x, members[m], args.x_stride), vector);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        v.element[e] = reaches(widen(v.element[e]), widen(maximum.element[e])) ? part.element[e] : narrow<T>(A(0));
      }
      store_vector(grad_x + members[m] * args.channels, vector, v);
    }
  }
}

// Groups own the slots, and after them the tokens: a dropped token has no slot to write its zeros.
template <class T, int kElements>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    amax_backward(const __grid_constant__ MergeBackwardArgs args, const __grid_constant__ RowConfig c) {
  const RowGroup g(c);
  const int64_t slots = args.images * args.num_out, row = g.row - slots;
  if (row < 0) {
    share_maximum<T, kElements>(args, c, g);
  } else if (row < args.images * args.tokens && args.dest[row] < 0) {
    move_row<T, kElements>(g, c, nullptr, Acc<T>(1), static_cast<T*>(args.grad_x) + row * args.channels);
  }
}

}  // namespace

void merge_backward(const MergeBackwardArgs& args, cudaStream_t stream) {
  const int64_t rows = args.images * args.tokens;
  const bool wants_x = args.grad_x && args.channels > 0;
  if (rows == 0 || (!wants_x && !args.grad_weight)) return;
  with_type<true>(kName, args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const uintptr_t alignment = address(args.grad_y) | address(args.x) | address(args.y) | address(args.grad_x) |
                                (args.x ? args.x_stride * sizeof(T) : 0);
    const RowConfig c = row_config(args.channels, sizeof(T), alignment);
    with_width<T>(c, [&](auto elements) {
      if (args.reduce != Reduce::amax) {
        launch(kName, linear_backward<T, elements>, divide_up(rows, c.rows_per_block), kRowThreads, 0, stream, args, c);
      } else if (wants_x) {
        const int64_t owners = args.images * args.num_out + rows;
        launch(kName, amax_backward<T, elements>, divide_up(owners, c.rows_per_block), kRowThreads, 0, stream, args, c);
      }
    });
  });
}

}  // namespace tokred::cuda
