// SPDX-License-Identifier: MIT
// Token attention, forward: a thread has one head of one image, and takes its queries a block at a time past all keys.
#include "attention_head.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T>
void attend_head(const TokenAttentionArgs& a, int64_t image, int64_t head) {
  using Sum = typename Element<T>::Sum;
  const ImageRows rows = image_rows(a, image);
  const HeadShape s = head_shape<Sum>(a, rows.count);
  thread_local Arena arena;
  Sum* values = arena.take<Sum>(s.keys * (s.padded + s.channels + 4) + kQueryBlock * (s.keys + 2 * s.padded));
  Sum* key_panels = values + s.keys * s.padded;
  Sum* bias = key_panels + s.keys * s.channels;
  Sum* policy = bias + s.keys;
  Sum* importance = policy + s.keys;
  Sum* block_importance = importance + s.keys;
  Sum* queries = block_importance + s.keys;
  Sum* out = queries + kQueryBlock * s.padded;
  Sum* scores = out + kQueryBlock * s.padded;

  // The keys lie as rows only until they are panels; then the values take their place.
  pack_rows(head_rows<T>(a.k, a.k_strides, rows, image, head), a.k_strides[2], s.tokens, s.channels, s.keys, s.padded,
            values);
  pack_panels(values, s.keys, s.channels, s.padded, key_panels);
  pack_rows(head_rows<T>(a.v, a.v_strides, rows, image, head), a.v_strides[2], s.tokens, s.channels, s.keys, s.padded,
            values);
  load_key_terms(a, rows, s, bias, policy);

  const T* q = head_rows<T>(a.q, a.q_strides, rows, image, head);
  if (a.partial) std::memset(static_cast<void*>(importance), 0, s.keys * sizeof(Sum));
  for (int64_t first = 0; first < s.tokens; first += kQueryBlock) {
    const int64_t count = std::min<int64_t>(kQueryBlock, s.tokens - first);
    pack_rows(q + first * a.q_strides[2], a.q_strides[2], count, s.channels, kQueryBlock, s.padded, queries);
    multiply_panels(queries, s.padded, key_panels, s.channels, s.keys, scores, count);
    if (a.partial) std::memset(static_cast<void*>(block_importance), 0, s.keys * sizeof(Sum));
    for (int64_t m = 0; m < count; ++m) {
      Sum* row = scores + m * s.keys;
      const RowStatistics<Sum> statistics = exponentiate<Sum>(a, s, row, bias, policy, first + m);
      weigh<Sum>(a, s, row, policy, first + m, statistics.sum);
      const int64_t at = (rows.first + first + m) * a.heads + head;
      static_cast<Sum*>(a.row_max)[at] = statistics.highest;
      static_cast<Sum*>(a.row_sum)[at] = statistics.sum;
      if (a.partial && counts(a.importance, first + m, s.tokens)) {
#pragma omp simd
        for (int64_t j = 0; j < s.keys; ++j) block_importance[j] += row[j];
      }
    }
    if (a.partial) {  // by blocks, so that the sum of many queries rounds no more often than it must
#pragma omp simd
      for (int64_t j = 0; j < s.keys; ++j) importance[j] += block_importance[j];
    }
    multiply_rows(scores, s.keys, values, s.tokens, s.padded, out, count);
    for (int64_t m = 0; m < count; ++m) {
      T* to = static_cast<T*>(a.out) + ((rows.first + first + m) * a.heads + head) * s.channels;
#pragma omp simd
      for (int64_t c = 0; c < s.channels; ++c) to[c] = Element<T>::store(out[m * s.padded + c]);
    }
  }
  if (a.partial) {
    Sum* to = static_cast<Sum*>(a.partial) + rows.first * a.heads + head;
    for (int64_t j = 0; j < s.tokens; ++j) to[j * a.heads] = importance[j];
  }
}

}  // namespace

void token_attention(const TokenAttentionArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.images * a.heads; ++task) attend_head<T>(a, task / a.heads, task % a.heads);
    if (!a.importance_out) return;
    const Sum* partial = static_cast<const Sum*>(a.partial);
    for (int64_t image = 0; image < a.images; ++image) {
      const ImageRows rows = image_rows(a, image);
      const Sum share = Sum(1) / static_cast<Sum>(a.heads * (a.importance == Importance::mean ? rows.count : 1));
      for (int64_t row = rows.first; row < rows.first + rows.count; ++row) {
        Sum total = 0;
        for (int64_t h = 0; h < a.heads; ++h) total += partial[row * a.heads + h];
        static_cast<Sum*>(a.importance_out)[row] = total * share;
      }
    }
  });
}

TOKRED_KERNELS_END
