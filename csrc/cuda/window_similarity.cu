// SPDX-License-Identifier: MIT
// The mean pairwise cosine of each window, from one pass over x.
#include "../common/row_config.h"
#include "../common/windows.h"
#include "block_scan.cuh"
#include "launch.h"
#include "ops.h"
#include "units.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "window_similarity";

// For a window of up to kFewTokens tokens, a group of lanes sums the products of all pairs of tokens in one pass: x is
// streamed and nothing is kept. With four tokens, this takes as much arithmetic as a pass for norms and a pass for unit
// vectors.
constexpr int kFewTokens = 4;
constexpr int kProducts = kFewTokens * (kFewTokens + 1) / 2;  // of each pair, and of each token with itself
// Units of each of its tokens that a lane loads at a time: rows in parts of units take more instructions and registers.
template <bool kWhole>
constexpr int kUnitsAtOnce = kWhole ? kSectorUnits : 1;
// Blocks that a multiprocessor must hold: 24 warps, each thread with 80 registers, enough for eight loads of 16 bytes
// in flight. That is 96 KB a multiprocessor.
constexpr int kFewBlocks = 3;
// Larger windows are a block's: enough threads for the units of a row, few enough that many blocks overlap.
constexpr int kManyThreads = 128;
constexpr int kManyBlocks = 8;     // that a multiprocessor must hold
constexpr int kNormsAtOnce = 128;  // inverse norms in shared memory
constexpr int kManyInFlight = 4;   // units that a thread loads at a time, of one token or of different ones

__device__ __forceinline__ float mean_cosine(float pairs, int32_t size) {
  const float tokens = static_cast<float>(size), mean = pairs / (tokens * (tokens - 1));
  return mean == mean ? mean : -INFINITY;
}

// Adds the products of every pair of tokens, and of each with itself, in the order (0, 0), (0, 1), ... (1, 1), ...
template <class T>
__device__ __forceinline__ void add_products(const Unit<T> (&v)[kFewTokens], float (&products)[kProducts]) {
#pragma unroll
  for (int e = 0; e < kUnitElements<T>; ++e) {
#pragma unroll
    for (int i = 0, n = 0; i < kFewTokens; ++i) {
#pragma unroll
      for (int j = i; j < kFewTokens; ++j, ++n) products[n] += widen(v[i].element[e]) * widen(v[j].element[e]);
    }
  }
}

template <class T>
__device__ __forceinline__ const T* image_rows(const WindowSimilarityArgs& args, int64_t image) {
  return static_cast<const T*>(args.x) + image * args.stride_b;
}

template <class T, bool kWhole>
__global__ void __launch_bounds__(kRowThreads, kFewBlocks)
    few_tokens(const __grid_constant__ WindowSimilarityArgs args, const __grid_constant__ WindowConfig c) {
  constexpr int kElements = kUnitElements<T>, kStep = kSectorUnits * kElements;
  const Windows& w = args.windows;
  const int64_t image = blockIdx.x / static_cast<unsigned>(c.blocks_per_image);
  const unsigned block = blockIdx.x % static_cast<unsigned>(c.blocks_per_image);
  const int lanes = 1 << c.lanes_log2, lane = threadIdx.x & (lanes - 1);
  const unsigned window = block * c.windows_per_block + (threadIdx.x >> c.lanes_log2), across = c.across;
  const int tokens = window_size(w);
  // Tokens that a window of fewer does not have repeat its first one; their products are left out at the end.
  const int32_t top = window / across * w.height, left_side = window % across * w.width;
  int32_t token[kFewTokens];
#pragma unroll
  for (int k = 0, y = top, x = left_side; k < kFewTokens; ++k) {
    token[k] = k < tokens ? w.first + y * w.grid_width + x : token[0];
    if (++x == left_side + w.width) x = left_side, ++y;
  }
  const int start = lane * kStep, step = lanes * kStep;  // elements
  const int channels = window < static_cast<unsigned>(c.number) ? static_cast<int>(args.channels) : 0;
  auto row_of = [&](int k) { return image_rows<T>(args, image) + token[k] * args.stride_n + start; };

  float products[kProducts] = {};
  const T* from[kFewTokens];
#pragma unroll
  for (int k = 0; k < kFewTokens; ++k) from[k] = row_of(k);
#pragma unroll 1
  for (int left = channels - start; left > 0; left -= step) {
#pragma unroll
    for (int unit = 0; unit < kSectorUnits; unit += kUnitsAtOnce<kWhole>) {
      Unit<T> v[kUnitsAtOnce<kWhole>][kFewTokens];
#pragma unroll
      for (int k = 0; k < kFewTokens; ++k) {
#pragma unroll
        for (int u = 0; u < kUnitsAtOnce<kWhole>; ++u) {
          v[u][k] = load_row_unit<kWhole>(from[k] + (unit + u) * kElements, left - (unit + u) * kElements);
        }
      }
#pragma unroll
      for (int u = 0; u < kUnitsAtOnce<kWhole>; ++u) add_products<T>(v[u], products);
    }
#pragma unroll
    for (int k = 0; k < kFewTokens; ++k) from[k] += step;
  }
  for (int other = 1; other < lanes; other *= 2) {
#pragma unroll
    for (int n = 0; n < kProducts; ++n) products[n] += __shfl_xor_sync(kFullWarp, products[n], other);
  }

  float inverse[kFewTokens], pairs = 0;
  bool infinite = false;
#pragma unroll
  for (int i = 0, n = 0; i < kFewTokens; n += kFewTokens - i++) {
    inverse[i] = i < tokens ? inverse_norm(products[n]) : 0.0f;
    infinite |= products[n] == INFINITY;
    pairs += 0.0f * inverse[i];  // NaN in, NaN out, even next to a zero token
  }
#pragma unroll
  for (int i = 0, n = 0; i < kFewTokens; ++i) {
#pragma unroll
    for (int j = i; j < kFewTokens; ++j, ++n) {
      if (i != j && inverse[i] != 0 && inverse[j] != 0) pairs += 2.0f * (products[n] * inverse[i] * inverse[j]);
    }
  }
  // A token's square is infinite because an element is, or because it overflowed; then it counts as zero. Only an
  // infinite element gives NaN when multiplied by 0.
  if (__any_sync(kFullWarp, infinite)) {
    float nothing = 0;
#pragma unroll 1
    for (int left = channels - start, offset = 0; left > 0; left -= step, offset += step) {
#pragma unroll
      for (int k = 0; k < kFewTokens; ++k) {
#pragma unroll
        for (int u = 0; u < kSectorUnits; ++u) {
          const Unit<T> v = load_row_unit<kWhole>(row_of(k) + offset + u * kElements, left - u * kElements);
#pragma unroll
          for (int e = 0; e < kElements; ++e) nothing += 0.0f * widen(v.element[e]);
        }
      }
    }
    for (int other = 1; other < lanes; other *= 2) nothing += __shfl_xor_sync(kFullWarp, nothing, other);
    pairs += nothing;
  }

  const float score = mean_cosine(pairs, window_size(w));
  const bool writes = window < static_cast<unsigned>(c.number) && lane == 0;
  if (writes) args.score[image * c.number + window] = score;
  const int reached = __syncthreads_count(writes && score >= args.threshold);
  if (threadIdx.x == 0 && reached) atomicAdd(&args.counts[image], reached);  // whole numbers: any order gives the same
}

// With unit vectors u_i: |sum u_i|^2 - sum |u_i|^2. The block's warps take the norms of some tokens each; then its
// threads, with some channels each, sum the unit vectors, whose rows are in the caches by then.
template <class T, bool kWhole>
__global__ void __launch_bounds__(kManyThreads, kManyBlocks)
    many_tokens(const __grid_constant__ WindowSimilarityArgs args, const __grid_constant__ WindowConfig c) {
  constexpr int kElements = kUnitElements<T>;
  __shared__ int32_t row[kNormsAtOnce];
  __shared__ float inverse[kNormsAtOnce];
  const Windows& w = args.windows;
  const int32_t size = window_size(w), window = blockIdx.x % static_cast<unsigned>(c.number);
  const int64_t image = blockIdx.x / static_cast<unsigned>(c.number);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, channels = static_cast<int>(args.channels);
  const T* rows = image_rows<T>(args, image);

  float total = 0, own = 0;
  for (int unit0 = 0; unit0 < c.units; unit0 += kManyThreads) {
    const int unit = unit0 + static_cast<int>(threadIdx.x);
    float sum[kElements] = {};
    for (int32_t token0 = 0; token0 < size; token0 += kNormsAtOnce) {
      const int32_t tokens = min(kNormsAtOnce, size - token0);
      const bool known = unit0 > 0 && size <= kNormsAtOnce;  // the norms, from the channels before these
      if (!known) {
        for (int32_t k = threadIdx.x; k < tokens; k += kManyThreads) row[k] = window_token(w, window, token0 + k);
      }
      __syncthreads();
      for (int32_t k = known ? tokens : warp; k < tokens; k += kManyThreads / kLanes) {
        const T* from = rows + row[k] * args.stride_n;
        float squared = 0;
#pragma unroll 1
        for (int u = lane; u < c.units; u += kLanes * kManyInFlight) {
          Unit<T> v[kManyInFlight];
#pragma unroll
          for (int i = 0; i < kManyInFlight; ++i) {
            const int offset = (u + i * kLanes) * kElements;
            v[i] = load_row_unit<kWhole>(from + offset, channels - offset);
          }
#pragma unroll
          for (int i = 0; i < kManyInFlight; ++i) {
#pragma unroll
            for (int e = 0; e < kElements; ++e) squared += widen(v[i].element[e]) * widen(v[i].element[e]);
          }
        }
        squared = sum_of_lanes<kLanes>(squared);
        if (lane != 0) continue;
        inverse[k] = inverse_norm(squared);
        if (unit0 == 0 && inverse[k] != 0) own += squared * inverse[k] * inverse[k];
      }
      __syncthreads();
      for (int32_t k = 0; k < tokens; k += kManyInFlight) {
        Unit<T> v[kManyInFlight];
#pragma unroll
        for (int i = 0; i < kManyInFlight; ++i) {
          const int left = k + i < tokens ? channels - unit * kElements : 0;
          v[i] = load_row_unit<kWhole>(rows + row[k + i] * args.stride_n + unit * kElements, left);
        }
#pragma unroll
        for (int i = 0; i < kManyInFlight; ++i) {
          const float factor = k + i < tokens ? inverse[k + i] : 0.0f;
#pragma unroll
          for (int e = 0; e < kElements; ++e) sum[e] += factor * widen(v[i].element[e]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) total += sum[e] * sum[e];
  }
  total = block_sum<kManyThreads>(total);
  own = block_sum<kManyThreads>(own);
  if (threadIdx.x != 0) return;
  const float score = mean_cosine(total - own, size);
  args.score[image * c.number + window] = score;
  if (score >= args.threshold) atomicAdd(&args.counts[image], 1);
}

}  // namespace

void window_similarity(const WindowSimilarityArgs& args, cudaStream_t stream) {
  with_type<false>(kName, args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.images == 0) return;
    check(kName, cudaMemsetAsync(args.counts, 0, args.images * sizeof(int32_t), stream));
    const uintptr_t strides = static_cast<uintptr_t>(args.stride_b | args.stride_n) * sizeof(T);
    const WindowConfig c =
        window_config(args.windows, args.channels, sizeof(T), reinterpret_cast<uintptr_t>(args.x) | strides);
    if (c.number == 0) return;
    if (window_size(args.windows) <= kFewTokens) {
      auto* kernel = c.whole ? few_tokens<T, true> : few_tokens<T, false>;
      launch(kName, kernel, c.blocks_per_image * args.images, kRowThreads, 0, stream, args, c);
    } else {
      auto* kernel = c.whole ? many_tokens<T, true> : many_tokens<T, false>;
      launch(kName, kernel, c.number * args.images, kManyThreads, 0, stream, args, c);
    }
  });
}

}  // namespace tokred::cuda
