// SPDX-License-Identifier: MIT
// Merge: a segment reduction over the members of each slot. A group of lanes owns an output row, so there are no
// atomics and every sum has one order. Most slots have one member, and are copies; the few long ones are shared out
// over the warps of the block.
#include "ops.h"
#include "row_copy.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "merge";

// Members of a slot whose vectors a lane has in flight: all of a merged window of 2 x 2.
constexpr int kMembersInFlight = 4;

template <class T>
__device__ __forceinline__ Acc<T> weight_of(const MergeArgs& args, int32_t row) {
  return args.weight ? static_cast<const Acc<T>*>(args.weight)[row] : Acc<T>(1);
}

template <class T>
__device__ __forceinline__ const T* row_of(const MergeArgs& args, int32_t row) {
  return static_cast<const T*>(args.x) + row * args.x_stride;
}

// Sum and maximum as one reduction: a start, a step for each member, and joining two partial results.
template <class T, bool kMax>
struct Reduction {
  using A = Acc<T>;
  static __device__ __forceinline__ A start() { return kMax ? -static_cast<A>(INFINITY) : A(0); }
  static __device__ __forceinline__ A join(A a, A b) {
    if constexpr (kMax) return b > a || b != b ? b : a;  // NaN in, NaN out
    return a + b;
  }
  static __device__ __forceinline__ A step(A a, A weight, T value) {
    if constexpr (kMax) return join(a, widen(value));
    return a + weight * widen(value);
  }
};

// From the reduced values to what is stored. A mean divides, so that the mean of equal members is exactly their value;
// it is 0 if the weights sum to 0.
template <class T, int kElements>
__device__ __forceinline__ Vector<T, kElements> finish(const Acc<T> (&values)[kElements], bool divide, Acc<T> total) {
  Vector<T, kElements> v;
#pragma unroll
  for (int e = 0; e < kElements; ++e)
    v.element[e] = narrow<T>(!divide ? values[e] : total == 0 ? Acc<T>(0) : values[e] / total);
  return v;
}

// One vector of members [begin, end) and their weights, in order; with no vector, their weights alone.
template <class T, int kElements, bool kMax>
__device__ __forceinline__ void reduce_vector(const MergeArgs& args, const int32_t* members, int32_t begin, int32_t end,
                                              int vector, bool present, Acc<T> (&values)[kElements], Acc<T>& weights) {
#pragma unroll
  for (int e = 0; e < kElements; ++e) values[e] = Reduction<T, kMax>::start();
  for (int32_t m = begin; m < end; m += kMembersInFlight) {
    // All loads come before the first use, and none behind a branch. Past the end the last member is loaded again, from
    // the cache, and zeros of weight zero are added in its place, which changes no sum.
    int32_t member[kMembersInFlight];
#pragma unroll
    for (int k = 0; k < kMembersInFlight; ++k) member[k] = members[min(m + k, end - 1)];
    Vector<T, kElements> v[kMembersInFlight];
    Acc<T> weight[kMembersInFlight];
#pragma unroll
    for (int k = 0; k < kMembersInFlight; ++k) {
      v[k].word = {};
      if (present) v[k] = load_vector<T, kElements>(row_of<T>(args, member[k]), vector);
    }
#pragma unroll
    for (int k = 0; k < kMembersInFlight; ++k) weight[k] = weight_of<T>(args, member[k]);
#pragma unroll
    for (int k = 0; k < kMembersInFlight; ++k) {
      if (kMax && m + k >= end) break;
      if (m + k >= end) v[k].word = {}, weight[k] = 0;
      weights += weight[k];
#pragma unroll
      for (int e = 0; e < kElements; ++e) values[e] = Reduction<T, kMax>::step(values[e], weight[k], v[k].element[e]);
    }
  }
}

template <class T, int kElements, bool kMax>
__device__ __forceinline__ void reduce_short(const MergeArgs& args, const RowConfig& c, const RowGroup& g,
                                             const int32_t* members, int32_t count) {
  using A = Acc<T>;
  T* y = static_cast<T*>(args.y) + g.row * args.channels;
  const bool mean = args.reduce == Reduce::mean;
  if (count <= 1) {
    const int32_t row = count ? members[0] : -1;
    const A weight = count ? weight_of<T>(args, row) : A(0);
    if (args.weight_sum && g.lane == 0) static_cast<A*>(args.weight_sum)[g.row] = weight;
    // w / w is 1, or NaN for an infinite weight or NaN. The mean of no weight is 0.
    const A factor = kMax ? A(1) : mean ? weight / weight : weight;
    const bool is_zero = count == 0 || (!kMax && mean && weight == 0);
    move_row<T, kElements>(g, c, is_zero ? nullptr : row_of<T>(args, row), factor, y);
    return;
  }
  A total = 0;
  for (int32_t m = 0; m < count; ++m) total += weight_of<T>(args, members[m]);
  if (args.weight_sum && g.lane == 0) static_cast<A*>(args.weight_sum)[g.row] = total;

  for (int vector = g.lane; vector < c.vectors; vector += g.lanes) {
    A values[kElements], weights = 0;
    reduce_vector<T, kElements, kMax>(args, members, 0, count, vector, true, values, weights);
    store_vector(y, vector, finish<T, kElements>(values, mean, total));
  }
}

// A row of many members, by the whole block: each warp reduces an equal share of consecutive members, and the warps'
// results are joined pairwise, so that the order depends on the count alone.
template <class T, int kElements, bool kMax>
__device__ __forceinline__ void reduce_long(const MergeArgs& args, const RowConfig& c, int64_t row) {
  using A = Acc<T>;
  using R = Reduction<T, kMax>;
  __shared__ A partial[kRowWarps][kElements][kLanes];
  __shared__ A partial_weight[kRowWarps];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int32_t* members = args.members + args.begin[row];
  const int32_t count = args.count[row], share = (count + kRowWarps - 1) / kRowWarps;
  const int32_t end = min(count, (warp + 1) * share);

  // At least one round: without channels, it still sums the weights.
  for (int first = 0; first == 0 || first < c.vectors; first += kLanes) {
    const int vector = first + lane;
    A values[kElements], weights = 0;
    reduce_vector<T, kElements, kMax>(args, members, warp * share, end, vector, vector < c.vectors, values, weights);
#pragma unroll
    for (int e = 0; e < kElements; ++e) partial[warp][e][lane] = values[e];
    if (lane == 0) partial_weight[warp] = weights;
    __syncthreads();
    if (warp == 0) {
      A total[kRowWarps];
#pragma unroll
      for (int w = 0; w < kRowWarps; ++w) total[w] = partial_weight[w];
#pragma unroll
      for (int half = kRowWarps / 2; half > 0; half /= 2) {
#pragma unroll
        for (int w = 0; w < half; ++w) total[w] += total[w + half];
      }
      if (first == 0 && lane == 0 && args.weight_sum) static_cast<A*>(args.weight_sum)[row] = total[0];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        A joined[kRowWarps];
#pragma unroll
        for (int w = 0; w < kRowWarps; ++w) joined[w] = partial[w][e][lane];
#pragma unroll
        for (int half = kRowWarps / 2; half > 0; half /= 2) {
#pragma unroll
          for (int w = 0; w < half; ++w) joined[w] = R::join(joined[w], joined[w + half]);
        }
        values[e] = joined[0];
      }
      if (vector < c.vectors) {
        store_vector(static_cast<T*>(args.y) + row * args.channels, vector,
                     finish<T, kElements>(values, args.reduce == Reduce::mean, total[0]));
      }
    }
    __syncthreads();
  }
}

template <class T, int kElements, bool kMax>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    merge_rows(const __grid_constant__ MergeArgs args, const __grid_constant__ RowConfig c) {
  __shared__ bool long_rows[kRowThreads];
  const RowGroup g(c);
  const bool present = g.row < args.rows_out;
  const int32_t count = present ? args.count[g.row] : 0, begin = present ? args.begin[g.row] : 0;
  const bool is_long = count > kLongSlot;
  if (present && !is_long) reduce_short<T, kElements, kMax>(args, c, g, args.members + begin, count);

  if (g.lane == 0) long_rows[g.group] = is_long;
  if (!__syncthreads_or(is_long)) return;
  for (int group = 0; group < c.rows_per_block; ++group) {
    if (long_rows[group]) reduce_long<T, kElements, kMax>(args, c, g.row - g.group + group);
  }
}

}  // namespace

void merge(const MergeArgs& args, cudaStream_t stream) {
  // Without channels there may still be weights to sum.
  if (args.rows_out == 0 || (args.channels == 0 && !args.weight_sum)) return;
  with_type<true>(kName, args.dtype, [&](auto zero) {
    using T = decltype(zero);
    const RowConfig c =
        row_config(args.channels, sizeof(T), address(args.x) | address(args.y) | args.x_stride * sizeof(T));
    with_width<T>(c, [&](auto elements) {
      auto* kernel = args.reduce == Reduce::amax ? merge_rows<T, elements, true> : merge_rows<T, elements, false>;
      launch(kName, kernel, divide_up(args.rows_out, c.rows_per_block), kRowThreads, 0, stream, args, c);
    });
  });
}

}  // namespace tokred::cuda
