// SPDX-License-Identifier: MIT
// What each native op takes: raw pointers, sizes and strides, and nothing of torch. The CPU and the CUDA
// implementation of an op take the same struct, so that the binding fills it once.
//
// Letters: B images, N tokens, C channels, D metric channels, H heads, N' output slots per image.
// Rows are absolute, b * N + n, so the movers never see images. All integer tensors are int32 and contiguous;
// all tensors have a last stride of 1. "acc" is the type sums are kept in: double for double, else float.
#pragma once

#include <cstdint>

namespace tokred {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };
enum class Reduce : int { sum = 0, mean = 1, amax = 2 };

// Which tokens may join which, as address arithmetic or as lists, and how the slots are laid out.
//   tokens [0, first)            slots 0 .. first-1, untouched
//   source i                     token sources[b, i], or first + i + i / (stride - 1)
//   destination j                token destinations[b, j], or first + j * stride + stride - 1
// With stride 2 and first 0 that is ToMe's even and odd split (num_src = ceil(N / 2): the odd tail is a source);
// with stride k it is the k-th split (num_src = num_dst * (k - 1): the tail is in neither, and is dropped).
// The first protected_src sources never join, the first protected_dst destinations are never joined.
// The r best sources (similarity descending, ties to the lower source number) join their best destination.
// protected_src > 0 comes with sources_by_index only, so that the protected sources lead the unmerged ones.
// Slots after `first`, with unm the sources that did not join (by source number if sources_by_index, else by
// descending similarity) and P = protected_dst:
//   unm u  -> 2 u if u < P, else u + P
//   dst j  -> 2 j + 1 if j < P, else (num_src - r) + j
struct Partition {
  const int32_t* sources;       // (B, num_src), or null: arithmetic
  const int32_t* destinations;  // (B, num_dst), null when sources is
  int32_t first;
  int32_t stride;
  int32_t num_src;
  int32_t num_dst;
  int32_t protected_src;
  int32_t protected_dst;
  int32_t sources_by_index;  // 0 or 1
  int32_t r;                 // 0 <= r <= num_src - protected_src, and 0 where num_dst <= protected_dst
};

// A token map's two views. num_out is N'; for image b the members occupy members[b * N, (b + 1) * N), grouped by
// slot, ascending inside a slot; what dropped tokens leave free at the end holds -1.
struct MatchArgs {
  const void* metric;  // (B, H, N, D); the mean over H is taken in float, and rounded to dtype when H > 1
  int64_t stride_b, stride_h, stride_n;
  int64_t images, heads, tokens, channels;
  DType dtype;
  Partition partition;
  int32_t* dest;     // (B, N): the slot of each token, -1 where it is dropped
  int32_t* members;  // (B * N): absolute rows
  int32_t* begin;    // (B * N'): where a slot's members start in `members`
  int32_t* count;    // (B * N'): how many there are
  void* workspace;   // bytes as match_workspace_bytes says, or null where that is 0
};

struct InvertArgs {
  const int32_t* dest;  // (B, N)
  int64_t images, tokens, num_out;
  int32_t* members;
  int32_t* begin;
  int32_t* count;
};

struct ComposeArgs {
  const int32_t* first;   // (B, N), into N1 slots
  const int32_t* second;  // (B, N1)
  int64_t images, tokens, middle;
  int32_t* dest;  // (B, N)
};

// y[s] = reduce over the members n of slot s of weight[n] * x[n]; a slot with no member gives 0.
struct MergeArgs {
  const void* x;  // (rows, C), dtype
  int64_t x_stride;
  const void* weight;  // (rows), acc, or null: all 1 (always null for amax)
  const int32_t* members;
  const int32_t* begin;
  const int32_t* count;
  void* y;           // (rows_out, C), dtype, contiguous
  void* weight_sum;  // (rows_out), acc, or null: not wanted
  int64_t rows_out, channels;
  DType dtype;
  Reduce reduce;
};

// With s = dest[n] (as an absolute row), g = grad_y[s], W = weight_sum[s] (count[s] without weight), w = weight[n]:
//   sum   grad_x = w g            grad_weight = <x, g>              + grad_weight_sum[s]
//   mean  grad_x = w / W g        grad_weight = (<x, g> - <y, g>)/W + grad_weight_sum[s]
//   amax  grad_x = g where x equals y (NaN equals NaN), divided by the number of members that do; else 0
// Rows that are dropped get 0. grad_weight_sum is null where the sizes that came out were not used.
struct MergeBackwardArgs {
  const void* grad_y;           // (rows_out, C), dtype, contiguous
  const void* grad_weight_sum;  // (rows_out), acc, or null
  const void* x;                // (rows, C), dtype; null unless grad_weight is wanted or reduce is amax
  int64_t x_stride;
  const void* y;           // (rows_out, C), dtype, contiguous; null unless (mean and grad_weight) or amax
  const void* weight;      // (rows), acc, or null
  const void* weight_sum;  // (rows_out), acc; null where weight is
  const int32_t* dest;
  const int32_t* members;
  const int32_t* begin;
  const int32_t* count;
  void* grad_x;       // (rows, C), dtype, contiguous, or null: not wanted
  void* grad_weight;  // (rows), acc, or null: not wanted
  int64_t images, tokens, num_out, channels;
  DType dtype;
  Reduce reduce;
};

// x[n] = y[dest[n]], 0 where dest[n] is -1.
struct UnmergeArgs {
  const void* y;  // (rows_out, C), dtype
  int64_t y_stride;
  const int32_t* dest;  // (B, N)
  void* x;              // (B * N, C), dtype, contiguous
  int64_t images, tokens, num_out, channels;
  DType dtype;
};

}  // namespace tokred
