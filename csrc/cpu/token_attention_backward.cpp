// SPDX-License-Identifier: MIT
// The gradients of token attention. With weights a_ij and g_ij, the gradient that reaches them from the output and the
// importance, D_i = sum_j a_ij g_ij, and Z_i what the weights of row i are divided by:
//   plain         ds_ij = a_ij (g_ij - D_i)
//   with policy   h_ij = (g_ij - D_i) / Z_i is the gradient of e_ij m_ij; ds_ij = h_ij m_ij e_ij, save that the highest
//   score of a
//                 row, which all others are taken from, gets - sum_j ds_ij more; dpolicy_j = sum over i != j of h_ij
//                 e_ij
//   dbias_j = sum_i ds_ij, dq = ds k scale, dk = ds^T q scale, dv = a^T dout
// A thread has one head of one image: nothing is added by two.
#include <utility>

#include "attention_head.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class Sum>
struct Work {
  Sum *keys, *key_panels, *value_panels, *grad_keys, *grad_values;
  Sum *bias, *policy, *grad_importance, *grad_bias, *grad_policy;
  Sum *queries, *grad_out, *grad_queries, *scores, *grads;
};

template <class Sum>
Work<Sum> work_memory(const HeadShape& s) {
  thread_local Arena arena;
  const int64_t rows = s.keys * s.padded, panels = s.keys * s.channels, block = kQueryBlock * s.padded;
  Sum* next = arena.take<Sum>(3 * rows + 2 * panels + 5 * s.keys + 3 * block + 2 * kQueryBlock * s.keys);
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  Work<Sum> w;
  w.keys = take(rows), w.grad_keys = take(rows), w.grad_values = take(rows);
  w.key_panels = take(panels), w.value_panels = take(panels);
  w.bias = take(s.keys), w.policy = take(s.keys), w.grad_importance = take(s.keys);
  w.grad_bias = take(s.keys), w.grad_policy = take(s.keys);
  w.queries = take(block), w.grad_out = take(block), w.grad_queries = take(block);
  w.scores = take(kQueryBlock * s.keys), w.grads = take(kQueryBlock * s.keys);
  return w;
}

template <class T, class Sum>
void load_head(const TokenAttentionBackwardArgs& a, const ImageRows& rows, const HeadShape& s, int64_t image,
               int64_t head, const Work<Sum>& w) {
  // The values lie as rows only until they are panels; then the keys take their place, and stay.
  pack_rows(head_rows<T>(a.v, a.v_strides, rows, image, head), a.v_strides[2], s.tokens, s.channels, s.keys, s.padded,
            w.keys);
  pack_panels(w.keys, s.keys, s.channels, s.padded, w.value_panels);
  pack_rows(head_rows<T>(a.k, a.k_strides, rows, image, head), a.k_strides[2], s.tokens, s.channels, s.keys, s.padded,
            w.keys);
  pack_panels(w.keys, s.keys, s.channels, s.padded, w.key_panels);
  load_key_terms(a, rows, s, w.bias, w.policy);
  const Sum* grad = static_cast<const Sum*>(a.grad_importance);
  const Sum share = Sum(1) / static_cast<Sum>(a.heads * (a.importance == Importance::mean ? rows.count : 1));
  for (int64_t j = 0; j < s.keys; ++j) w.grad_importance[j] = grad && j < s.tokens ? grad[rows.first + j] * share : 0;
  std::memset(static_cast<void*>(w.grad_keys), 0, s.keys * s.padded * sizeof(Sum));
  std::memset(static_cast<void*>(w.grad_values), 0, s.keys * s.padded * sizeof(Sum));
  std::memset(static_cast<void*>(w.grad_bias), 0, s.keys * sizeof(Sum));
  std::memset(static_cast<void*>(w.grad_policy), 0, s.keys * sizeof(Sum));
}

// One query: `row` comes as products q . k and leaves as weights, `grad` comes as the gradient of the weights that the
// output gives and leaves as that of the scores.
template <class Sum>
void differentiate_row(const TokenAttentionBackwardArgs& a, const HeadShape& s, const Work<Sum>& w, int64_t query,
                       Sum highest, Sum sum, Sum* row, Sum* grad) {
  const Sum scale = static_cast<Sum>(a.scale), inverse = 1 / sum;
  // Copies that no store through `row` or `grad` can change: with them the loops below become vectors.
  const int64_t keys = s.keys;
  const Sum *bias = w.bias, *policy = w.policy, *grad_importance = w.grad_importance;
  Sum *grad_bias = w.grad_bias, *grad_policy = w.grad_policy;
  if (a.grad_importance && counts(a.importance, query, s.tokens)) {
#pragma omp simd
    for (int64_t j = 0; j < keys; ++j) grad[j] += grad_importance[j];
  }
  if (!a.policy) {
    Sum mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < keys; ++j) {
      row[j] = exponential(row[j] * scale + bias[j] - highest) * inverse;
      mean += row[j] * grad[j];
    }
#pragma omp simd
    for (int64_t j = 0; j < keys; ++j) grad[j] = row[j] * (grad[j] - mean);
  } else {
    const Sum least = static_cast<Sum>(kPolicyEps) / static_cast<Sum>(s.tokens);
    // Not the score that equals `highest`: the forward may have added the products in another order.
    int64_t top = 0;
    for (int64_t j = 1; j < s.tokens; ++j) {
      if (row[j] * scale + bias[j] > row[top] * scale + bias[top]) top = j;
    }
    Sum mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t j = 0; j < keys; ++j) {
      row[j] = exponential(row[j] * scale + bias[j] - highest);
      mean += (row[j] * policy[j] + least) * grad[j];
    }
    const Sum own = row[query], own_policy = policy[query];
    mean = (mean + own * (1 - own_policy) * grad[query]) * inverse;
    const Sum own_grad = (grad[query] - mean) * inverse * own;
    Sum total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < keys; ++j) {
      const Sum kept = (grad[j] - mean) * inverse * row[j];
      grad_policy[j] += kept;
      grad[j] = kept * policy[j];
      total += grad[j];
      row[j] = (row[j] * policy[j] + least) * inverse;
    }
    grad_policy[query] -= own_grad;
    total += own_grad - grad[query];
    grad[query] = own_grad;
    row[query] = (own + least) * inverse;
    grad[top] -= total;
  }
#pragma omp simd
  for (int64_t j = 0; j < keys; ++j) grad_bias[j] += grad[j];
}

template <class T, class Sum>
void store_rows(const Sum* from, int64_t padded, int64_t count, int64_t channels, Sum factor, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) to[i * stride + c] = Element<T>::store(from[i * padded + c] * factor);
  }
}

template <class T>
void differentiate_head(const TokenAttentionBackwardArgs& a, int64_t image, int64_t head) {
  using Sum = typename Element<T>::Sum;
  const ImageRows rows = image_rows(a, image);
  const HeadShape s = head_shape<Sum>(a, rows.count);
  const Work<Sum> w = work_memory<Sum>(s);
  load_head<T>(a, rows, s, image, head, w);

  const T* q = head_rows<T>(a.q, a.q_strides, rows, image, head);
  const T* grad_out = head_rows<T>(a.grad_out, a.grad_out_strides, rows, image, head);
  const Sum scale = static_cast<Sum>(a.scale);
  const int64_t row_stride = a.heads * s.channels, start = rows.first * row_stride + head * s.channels;
  for (int64_t first = 0; first < s.tokens; first += kQueryBlock) {
    const int64_t count = std::min<int64_t>(kQueryBlock, s.tokens - first);
    pack_rows(q + first * a.q_strides[2], a.q_strides[2], count, s.channels, kQueryBlock, s.padded, w.queries);
    pack_rows(grad_out + first * a.grad_out_strides[2], a.grad_out_strides[2], count, s.channels, kQueryBlock, s.padded,
              w.grad_out);
    multiply_panels(w.queries, s.padded, w.key_panels, s.channels, s.keys, w.scores, count);
    multiply_panels(w.grad_out, s.padded, w.value_panels, s.channels, s.keys, w.grads, count);
    for (int64_t m = 0; m < count; ++m) {
      Sum *row = w.scores + m * s.keys, *grad = w.grads + m * s.keys;
      const int64_t at = (rows.first + first + m) * a.heads + head;
      differentiate_row<Sum>(a, s, w, first + m, static_cast<const Sum*>(a.row_max)[at],
                             static_cast<const Sum*>(a.row_sum)[at], row, grad);
    }
    multiply_rows(w.grads, s.keys, w.keys, s.tokens, s.padded, w.grad_queries, count);
    store_rows(w.grad_queries, s.padded, count, s.channels, scale,
               static_cast<T*>(a.grad_q) + start + first * row_stride, row_stride);
    add_outer(w.grads, s.keys, s.tokens, w.queries, s.padded, w.grad_keys, count);
    add_outer(w.scores, s.keys, s.tokens, w.grad_out, s.padded, w.grad_values, count);
  }
  store_rows(w.grad_keys, s.padded, s.tokens, s.channels, scale, static_cast<T*>(a.grad_k) + start, row_stride);
  store_rows(w.grad_values, s.padded, s.tokens, s.channels, Sum(1), static_cast<T*>(a.grad_v) + start, row_stride);
  for (int64_t j = 0; j < s.tokens; ++j) {
    const int64_t at = (rows.first + j) * a.heads + head;
    if (a.grad_bias) static_cast<Sum*>(a.grad_bias)[at] = w.grad_bias[j];
    if (a.grad_policy) static_cast<Sum*>(a.grad_policy)[at] = w.grad_policy[j];
  }
}

}  // namespace

void token_attention_backward(const TokenAttentionBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
#pragma omp parallel for schedule(dynamic, 1)
    for (int64_t task = 0; task < a.images * a.heads; ++task) differentiate_head<T>(a, task / a.heads, task % a.heads);
  });
}

TOKRED_KERNELS_END
