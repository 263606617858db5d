// SPDX-License-Identifier: MIT
// What each native op takes: raw pointers, sizes and strides, and nothing of torch. The CPU and the CUDA
// implementation of an op take the same struct, so that the binding fills it once.
//
// Letters: B images, N tokens, C channels, D metric channels, H heads, N' output slots per image.
// Rows are absolute, b * N + n, so merge and unmerge never see images. All integer tensors are int32 and contiguous;
// all tensors have a last stride of 1. "acc" is the type sums are kept in: double for double, else float.
#pragma once

#include <cstdint>

namespace tokred {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3 };
enum class Reduce : int { sum = 0, mean = 1, amax = 2 };

// Which tokens may join which, as address arithmetic or as lists, and how the slots are laid out.
//   tokens [0, first)            slots 0 .. first-1, untouched
//   source i                     token sources[b, i], or first + i + i / (stride - 1), with stride 1 first + num_dst +
//   i destination j                token destinations[b, j], or first + j * stride + stride - 1
// With stride 2 and first 0 that is ToMe's even and odd split (num_src = ceil(N / 2): the odd tail is a source);
// with stride k it is the k-th split (num_src = num_dst * (k - 1): the tail is in neither, and is dropped); with
// stride 1 the destinations come first, and the sources are the rest.
// The first protected_src sources never join, the first protected_dst destinations are never joined.
// The r best sources (similarity descending, ties to the lower source number) join their best destination.
// protected_src > 0 comes with sources_by_index only, so that the protected sources lead the unmerged ones.
// Slots after `first`, with unm the sources that did not join (by source number if sources_by_index, else by
// descending similarity) and P = min(protected_dst, num_src - r):
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

// What is matched. Packed images (starts given; heads 1) lie one after the other: image b has the rows starts[b] to
// starts[b + 1] of metric, stride_b is not used, `tokens` is the length of the longest image, and the partition is that
// of the longest one: with stride 2, first 0 and no lists, image b of n tokens has ceil(n / 2) sources and n / 2
// destinations.
struct MatchProblem {
  const void* metric;  // (B, H, N, D); the mean over H is taken in float, and rounded to dtype when H > 1
  int64_t stride_b, stride_h, stride_n;
  int64_t images, heads, tokens, channels;
  DType dtype;
  Partition partition;
  const int32_t* starts;  // (B + 1), or null: not packed
};

// A token map's two views. num_out is N'; for image b the members occupy members[b * N, (b + 1) * N), grouped by
// slot, ascending inside a slot; what dropped tokens leave free at the end holds -1.
struct MatchArgs : MatchProblem {  // never packed
  int32_t* dest;                   // (B, N): the slot of each token, -1 if it is dropped
  int32_t* members;                // (B * N): absolute rows
  int32_t* begin;                  // (B * N'): where a slot's members start in `members`
  int32_t* count;                  // (B * N'): how many there are
  void* workspace;                 // of match_workspace_bytes(args) bytes, or null if that is 0
};

// The part of a match that does not depend on r. A source that is protected, or absent because its image is shorter
// than the longest, has score -infinity and rank kNoRank; one that no number wins (it holds NaN) has score -infinity.
struct BestMatchArgs : MatchProblem {
  float* score;      // (B, num_src): the highest cosine
  int32_t* partner;  // (B, num_src): the number of the destination that has it, the lowest of equals
  int32_t* rank;     // (B, num_src): the place among the sources that may join, by descending score, ties by number
  void* workspace;   // of rank_candidates_workspace_bytes(args) bytes, or null if that is 0
};

// The map of a match in which r sources join. If r is 0, every token keeps its place.
// Packed (counts and starts_out given): counts[b] takes the place of r in image b, its slots are the rows starts_out[b]
// to starts_out[b + 1] of the output, dest holds such rows, and begin and count have one entry for each of them,
// num_out in all. Then tokens may come packed as well, as in MatchProblem (starts_in given), and an image's members
// start at its first row.
struct MatchMapArgs {
  const int32_t* partner;  // (B, num_src)
  const int32_t* rank;     // (B, num_src)
  int64_t images, tokens;  // tokens: N, or the total over all images if they are packed
  Partition partition;
  const int32_t* counts;      // (B), or null
  const int32_t* starts_in;   // (B + 1), or null
  const int32_t* starts_out;  // (B + 1), or null
  int64_t num_out;            // where packed
  int32_t* dest;
  int32_t* members;
  int32_t* begin;
  int32_t* count;
};

// How many scores of each image reach a threshold: `threshold` as a float, or, where divisor is not 0, mean + std /
// divisor of the scores above -infinity, in double: of the image itself where `own`, else averaged over the images. The
// std is unbiased; with fewer than two scores it is NaN, and so is the threshold, which nothing reaches. -infinity
// never does.
struct SimilarCountArgs {
  const float* score;  // (B, sources)
  int64_t images, sources;
  double threshold, divisor;
  int32_t own;      // 0 or 1
  double* moments;  // (B, 2), or null on the CPU: workspace for the mean and std of each image
  int32_t* counts;  // (B)
};

// Windows of height x width tokens over a grid, row by row from its top left, after `first` other tokens. What they
// leave of the grid at its right and bottom is in none.
struct Windows {
  int32_t first, grid_height, grid_width, height, width;
};

// With unit vectors u_i (0 for a zero token) of a window of n tokens: (|sum u_i|^2 - sum |u_i|^2) / (n (n - 1)), its
// mean pairwise cosine, in float; -infinity instead of NaN.
struct WindowSimilarityArgs {
  const void* x;  // (B, N, C)
  int64_t stride_b, stride_n;
  int64_t images, channels;
  DType dtype;
  Windows windows;
  float threshold;
  float* score;     // (B, W)
  int32_t* counts;  // (B): how many of them reach the threshold
};

// The map that merges the r windows of highest score, ties to the lower number. Slots: the `first` tokens, the merged
// windows by rank, all other tokens by index. Packed (counts and starts_out given): as in MatchMapArgs.
struct WindowMapArgs {
  const float* score;  // (B, W), no NaN
  int64_t images;
  Windows windows;
  int32_t r;
  const int32_t* counts;      // (B), or null
  const int32_t* starts_out;  // (B + 1), or null
  int32_t* dest;
  int32_t* members;
  int32_t* begin;
  int32_t* count;
  int64_t num_slots;  // of begin and count; the CPU checks starts_out against it
};

struct ToCsrArgs {
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
  int64_t rows_in, num_members;  // of x and of members; the CPU checks begin, count and members against them
};

// With s = dest[n] (as an absolute row), g = grad_y[s], W = weight_sum[s] (count[s] without weight), w = weight[n]:
//   sum   grad_x = w g            grad_weight = <x, g>              + grad_weight_sum[s]
//   mean  grad_x = w / W g        grad_weight = (<x, g> - <y, g>)/W + grad_weight_sum[s]; with W = 0 only the last term
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
  int64_t num_members;  // of members, as in MergeArgs
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

// Keeps `first` leading tokens and the k of highest score, ties to the lower index, NaN last. Slots: the leading
// tokens, the kept ones by descending score, and, where fuse is 1, one for all others; else those are dropped (-1).
struct KeepTopkArgs {
  const float* score;  // (B, N), those of the leading tokens not looked at
  int64_t stride;      // between images
  int64_t images, tokens;
  int32_t first, k;
  int32_t fuse;  // 0 or 1
  int32_t* dest;
  int32_t* members;
  int32_t* begin;
  int32_t* count;
};

enum class Importance : int { none = 0, first = 1, mean = 2, last = 3 };

// softmax(q k^T scale + bias) v, image by image and head by head. With a policy P: e_ij = exp(s_ij - max_j s_ij),
// m_ij = P_j but 1 for i = j, weights (e m + eps / N) / (sum e m + eps). Importance of key j, averaged over heads: the
// weight it has in the first row, in the last one, or in the mean of all rows.
// Packed images (starts given) lie one after the other: image b has rows starts[b] to starts[b + 1], the image's stride
// is 0, and `tokens` is the length of the longest.
struct TokenAttentionProblem {
  const void *q, *k, *v;                             // (B, H, N, d), each
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of image, head and token
  int64_t images, heads, tokens, channels;
  DType dtype;
  double scale;
  const void* bias;       // (rows), acc, or null
  const void* policy;     // (rows), acc, or null
  const int32_t* starts;  // (B + 1), or null
  Importance importance;
  void* row_max;  // (rows, H), acc: the highest score of each query
  void* row_sum;  // (rows, H), acc: what its weights are divided by
};

struct TokenAttentionArgs : TokenAttentionProblem {
  void* out;             // (rows, H, d), dtype, contiguous
  void* partial;         // (rows, H), acc, or null: workspace of importance
  void* importance_out;  // (rows), acc, or null
};

struct TokenAttentionBackwardArgs : TokenAttentionProblem {
  const void* grad_out;  // (B, H, N, d)
  int64_t grad_out_strides[3];
  const void* grad_importance;     // (rows), acc, or null
  void *grad_q, *grad_k, *grad_v;  // (rows, H, d), dtype, contiguous
  void* grad_bias;                 // (rows, H), acc, or null: of each head, to be summed
  void* grad_policy;               // (rows, H), acc, or null: likewise
};

// Lookup attention: M compressed tokens with queries, N lookup tokens with keys; A_mn = exp(q_m k_n scale - lse_m),
// lse_m the logarithm of the sum over n of exp(q_m k_n scale), so that rows of A sum to 1.
struct LookupProblem {
  const void* q;                       // (B, H, M, d)
  const void* k;                       // (B, H, N, d)
  int64_t q_strides[3], k_strides[3];  // of image, head and token
  int64_t images, heads, compressed, tokens, channels;
  DType dtype;
  double scale;
};

// out = A v, and lse.
struct LookupGatherArgs : LookupProblem {
  const void* v;  // (B, H, N, d)
  int64_t v_strides[3];
  void* out;  // (B, M, H, d), dtype, contiguous
  void* lse;  // (B, H, M), acc
};

// With g the gradient of out, ds = A (g v^T - (g . out) + grad_lse): grad_q = ds k scale, grad_k = ds^T q scale,
// grad_v = A^T g.
struct LookupGatherBackwardArgs : LookupProblem {
  const void* v;
  int64_t v_strides[3];
  const void* grad_out;  // (B, H, M, d)
  int64_t grad_out_strides[3];
  const void* grad_lse;            // (B, H, M), acc, or null
  const void* out;                 // (B, M, H, d), dtype, contiguous
  const void* lse;                 // (B, H, M), acc
  void *grad_q, *grad_k, *grad_v;  // (B, M, H, d), (B, N, H, d) and again, dtype, contiguous
  // v and the output gradient of a scatter with the same weights, or null. Its part of ds, A (scatter_v
  // scatter_grad^T), is added here, and so is its part of grad_q and grad_k. On the CPU only.
  const void* scatter_v;  // (B, H, M, d)
  int64_t scatter_v_strides[3];
  const void* scatter_grad;  // (B, H, N, d)
  int64_t scatter_grad_strides[3];
};

// out = A^T v.
struct LookupScatterArgs : LookupProblem {
  const void* v;  // (B, H, M, d)
  int64_t v_strides[3];
  const void* lse;  // (B, H, M), acc
  void* out;        // (B, N, H, d), dtype, contiguous
};

// With g the gradient of out, ds = A (v g^T): grad_q = ds k scale, grad_k = ds^T q scale, grad_v = A g,
// grad_lse = - sum over n of ds, which is - v . grad_v. On the CPU grad_q and grad_k may be null, both: not asked for.
struct LookupScatterBackwardArgs : LookupProblem {
  const void* v;
  int64_t v_strides[3];
  const void* grad_out;  // (B, H, N, d)
  int64_t grad_out_strides[3];
  const void* lse;
  void *grad_q, *grad_k, *grad_v;  // (B, M, H, d), (B, N, H, d), (B, M, H, d), dtype, contiguous
  void* grad_lse;                  // (B, H, M), acc
};

}  // namespace tokred
