// SPDX-License-Identifier: MIT
// What the gradients of lookup attention's gather and scatter have in common: scores, and what they are made of.
#pragma once

#include "lookup_head.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// A task's memory. `few` belongs to queries and `many` to keys: of the gather the gradient of its output and v, of the
// scatter v and the gradient of its output.
template <class T, class Sum>
struct LookupGradients {
  Few<T, Sum> queries, few;
  Sum *lse, *keys, *many, *grad, *weights, *slopes;

  static int64_t size(const LookupShape& s) { return 4 * s.rows() + s.queries + 3 * s.block() + 2 * s.weights(); }

  template <class Take>
  LookupGradients(const LookupProblem& a, const LookupShape& s, const LookupTask& t, const void* few_data,
                  const int64_t (&few_strides)[3], const void* lse_data, const Take& take)
      : queries(a, s, t, a.q, a.q_strides, static_cast<Sum>(a.scale), take),
        few(a, s, t, few_data, few_strides, Sum(1), take),
        lse(take(s.queries)),
        keys(take(s.block())),
        many(take(s.block())),
        grad(take(s.block())),
        weights(take(s.weights())),
        slopes(take(s.weights())) {
    load_lse(a, s, t, lse_data, lse);
  }

  // Of a block of keys: its weights, and the gradients of its scores, from which it stores grad_k and adds to grad_q.
  // slope(weight, slope) makes these gradients, of one key, of the products of few and many.
  template <class Slope>
  void differentiate_scores(const LookupProblem& a, const LookupShape& s, const LookupTask& t, int64_t key,
                            int64_t count, const void* many_data, const int64_t (&many_strides)[3], const Slope& slope,
                            Sum* grad_q, void* grad_k, bool onto_k = false) const {
    pack_block<T>(a, s, t, key, count, a.k, a.k_strides, keys);
    pack_block<T>(a, s, t, key, count, many_data, many_strides, many);
    multiply_panels(keys, s.padded, queries.panels, a.channels, s.queries, weights, count);
    multiply_panels(many, s.padded, few.panels, a.channels, s.queries, slopes, count);
    for (int64_t j = 0; j < count; ++j) {
      weigh_by_lse(weights + j * s.queries, s.queries, lse);
      slope(weights + j * s.queries, slopes + j * s.queries);
    }
    multiply_rows(slopes, s.queries, queries.rows, a.compressed, s.padded, grad, count);
    store_key_rows<T>(a, s, t, key, count, grad, grad_k, onto_k);
    add_outer(slopes, s.queries, a.compressed, keys, s.padded, grad_q, count);
  }
};

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
