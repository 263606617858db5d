// SPDX-License-Identifier: MIT
// Token attention, forward: a thread has one head of one image, and takes its queries a block at a time past all keys.
#include "attention_products.h"
#include "for_each.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T>
void attend_head(const TokenAttentionArgs& a, int64_t image, int64_t head) {
  using Sum = typename Element<T>::Sum;
  using Products = typename ProductsOf<T>::Type;
  const ImageRows rows = image_rows(a, image);
  const HeadShape s = head_shape<Sum>(a, rows.count);
  thread_local Arena arena;
  Sum* bias = arena.take<Sum>((4 + Products::kQueries) * s.keys + Products::size(s));
  Sum* policy = bias + s.keys;
  Sum* importance = policy + s.keys;
  Sum* block_importance = importance + s.keys;
  Sum* scores = block_importance + s.keys;

  const auto head_of = [&](const void* data, const int64_t (&strides)[3]) {
    return HeadRows<T>{head_rows<T>(data, strides, rows, image, head), strides[2]};
  };
  const Products products(s, head_of(a.k, a.k_strides), head_of(a.v, a.v_strides),
                          scores + Products::kQueries * s.keys);
  load_key_terms(a, rows, s, bias, policy);

  const HeadRows<T> q = head_of(a.q, a.q_strides);
  if (a.partial) clear(importance, s.keys);
  for (int64_t first = 0; first < s.tokens; first += Products::kQueries) {
    const int64_t count = std::min(Products::kQueries, s.tokens - first);
    products.score({q.first + first * q.stride, q.stride}, count, scores);
    if (a.partial) clear(block_importance, s.keys);
    Sum factors[Products::kQueries];
    for (int64_t m = 0; m < count; ++m) {
      Sum* row = scores + m * s.keys;
      const RowStatistics<Sum> statistics = exponentiate<Sum>(a, s, row, bias, policy, first + m);
      const Sum factor = factors[m] = weigh<Sum>(a, s, row, policy, first + m, statistics.sum);
      const int64_t at = (rows.first + first + m) * a.heads + head;
      static_cast<Sum*>(a.row_max)[at] = statistics.highest;
      static_cast<Sum*>(a.row_sum)[at] = statistics.sum;
      if (a.partial && counts(a.importance, first + m, s.tokens)) {
#pragma omp simd
        for (int64_t j = 0; j < s.keys; ++j) block_importance[j] += row[j] * factor;
      }
    }
    if (a.partial) {  // by blocks, so that the sum of many queries rounds no more often than it must
#pragma omp simd
      for (int64_t j = 0; j < s.keys; ++j) importance[j] += block_importance[j];
    }
    const Sum* out = products.average(scores, count);
    for (int64_t m = 0; m < count; ++m, out += Products::out_stride(s)) {
      T* to = static_cast<T*>(a.out) + ((rows.first + first + m) * a.heads + head) * s.channels;
#pragma omp simd
      for (int64_t c = 0; c < s.channels; ++c) to[c] = Element<T>::store(out[c] * factors[m]);
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
    for_each_dynamic(a.images * a.heads, [&](int64_t task) { attend_head<T>(a, task / a.heads, task % a.heads); });
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
