// SPDX-License-Identifier: MIT
// The gradients of token attention. With weights a_ij and g_ij, the gradient that reaches them from the output and the
// importance, D_i = sum_j a_ij g_ij, and Z_i the divisor of the weights of row i:
//   plain         ds_ij = a_ij (g_ij - D_i)
//   with policy   h_ij = (g_ij - D_i) / Z_i is the gradient of e_ij m_ij; ds_ij = h_ij m_ij e_ij, and the highest score
//                 of a row, which is subtracted from all scores, gets an additional - sum_j ds_ij;
//                 dpolicy_j = sum over i != j of h_ij e_ij
//   dbias_j = sum_i ds_ij, dq = ds k scale, dk = ds^T q scale, dv = a^T dout
// A thread takes one head of one image, so no two threads add to the same value.
#include <utility>

#include "attention_gradients.h"
#include "for_each.h"

TOKRED_KERNELS_BEGIN
namespace {

// The terms of each key.
template <class Sum>
struct KeyTerms {
  Sum *bias, *policy, *grad_importance, *grad_bias, *grad_policy;
  static int64_t size(const HeadShape& s) { return 5 * s.keys; }

  template <class Take>
  KeyTerms(const TokenAttentionBackwardArgs& a, const ImageRows& rows, const HeadShape& s, const Take& take)
      : bias(take(s.keys)),
        policy(take(s.keys)),
        grad_importance(take(s.keys)),
        grad_bias(take(s.keys)),
        grad_policy(take(s.keys)) {
    load_key_terms(a, rows, s, bias, policy);
    const Sum* grad = static_cast<const Sum*>(a.grad_importance);
    const Sum share = Sum(1) / static_cast<Sum>(a.heads * (a.importance == Importance::mean ? rows.count : 1));
    for (int64_t j = 0; j < s.keys; ++j) grad_importance[j] = grad && j < s.tokens ? grad[rows.first + j] * share : 0;
    clear(grad_bias, s.keys);
    clear(grad_policy, s.keys);
  }
};

// One query: `row` comes as products q . k and leaves as weights, `grad` comes as the gradient of the weights that the
// output gives and leaves as that of the scores.
template <class Sum>
void differentiate_row(const TokenAttentionBackwardArgs& a, const HeadShape& s, const KeyTerms<Sum>& w, int64_t query,
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
    // Found anew: the forward may have added the products in another order, and its highest be none of these.
    Sum greatest = -std::numeric_limits<Sum>::infinity();
#pragma omp simd reduction(max : greatest)
    for (int64_t j = 0; j < keys; ++j) {
      const Sum score = row[j] * scale + bias[j];
      greatest = score > greatest ? score : greatest;
    }
    int32_t top = static_cast<int32_t>(s.tokens - 1);
#pragma omp simd reduction(min : top)
    for (int32_t j = 0; j < static_cast<int32_t>(keys); ++j) {
      const int32_t candidate = row[j] * scale + bias[j] == greatest ? j : top;
      top = candidate < top ? candidate : top;
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

template <class T>
void differentiate_head(const TokenAttentionBackwardArgs& a, int64_t image, int64_t head) {
  using Sum = typename Element<T>::Sum;
  using Products = typename GradientsOf<T>::Type;
  const ImageRows rows = image_rows(a, image);
  const HeadShape s = head_shape<Sum>(a, rows.count);
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(Products::size(s) + KeyTerms<Sum>::size(s) + 2 * Products::kQueries * s.keys);
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  const auto head_of = [&](const void* data, const int64_t (&strides)[3]) {
    return HeadRows<T>{head_rows<T>(data, strides, rows, image, head), strides[2]};
  };
  const Products products(s, head_of(a.k, a.k_strides), head_of(a.v, a.v_strides), take);
  const KeyTerms<Sum> terms(a, rows, s, take);
  Sum *scores = take(Products::kQueries * s.keys), *grads = take(Products::kQueries * s.keys);

  const HeadRows<T> q = head_of(a.q, a.q_strides), grad_out = head_of(a.grad_out, a.grad_out_strides);
  const Sum scale = static_cast<Sum>(a.scale);
  const int64_t row_stride = a.heads * s.channels, start = rows.first * row_stride + head * s.channels;
  const auto store = [&](const Sum* from, int64_t count, Sum factor, void* to, int64_t first) {
    store_rows(from, Products::stride(s), count, s.channels, factor, static_cast<T*>(to) + start + first * row_stride,
               row_stride);
  };
  for (int64_t first = 0; first < s.tokens; first += Products::kQueries) {
    const int64_t count = std::min(Products::kQueries, s.tokens - first);
    products.score({q.first + first * q.stride, q.stride}, {grad_out.first + first * grad_out.stride, grad_out.stride},
                   count, scores, grads);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t at = (rows.first + first + m) * a.heads + head;
      differentiate_row<Sum>(a, s, terms, first + m, static_cast<const Sum*>(a.row_max)[at],
                             static_cast<const Sum*>(a.row_sum)[at], scores + m * s.keys, grads + m * s.keys);
    }
    store(products.spread(scores, grads, count), count, scale, a.grad_q, first);
  }
  store(products.grad_keys(), s.tokens, scale, a.grad_k, 0);
  store(products.grad_values(), s.tokens, Sum(1), a.grad_v, 0);
  for (int64_t j = 0; j < s.tokens; ++j) {
    const int64_t at = (rows.first + j) * a.heads + head;
    if (a.grad_bias) static_cast<Sum*>(a.grad_bias)[at] = terms.grad_bias[j];
    if (a.grad_policy) static_cast<Sum*>(a.grad_policy)[at] = terms.grad_policy[j];
  }
}

}  // namespace

void token_attention_backward(const TokenAttentionBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    for_each_dynamic(a.images * a.heads,
                     [&](int64_t task) { differentiate_head<T>(a, task / a.heads, task % a.heads); });
  });
}

TOKRED_KERNELS_END
