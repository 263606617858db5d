// SPDX-License-Identifier: MIT
// The gradients of lookup attention's scatter; the equations are in args.h.
#include "lookup_gradients.h"

TOKRED_KERNELS_BEGIN
namespace {

// What a chunk leaves: its share of grad_q and grad_v, (sums, padded) each, and of - grad_lse.
template <class Sum>
struct ChunkGrads {
  Sum *q, *v, *lse;
  ChunkGrads(Sum* at, const LookupShape& s) : q(at), v(at + s.sums * s.padded), lse(at + 2 * s.sums * s.padded) {}
  static int64_t size(const LookupShape& s) { return 2 * s.sums * s.padded + s.queries; }
};

template <class T, class Sum>
void differentiate_chunk(const LookupScatterBackwardArgs& a, const LookupShape& s, const LookupTask& t,
                         const ChunkGrads<Sum>& grad) {
  using Gradients = LookupGradients<T, true>;
  using Sums = typename Gradients::Sums;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(Gradients::size(s) + Sums::size(s));
  const auto take = [&](int64_t number) { return std::exchange(next, next + number); };
  const Gradients g(a, s, t, a.v, a.v_strides, a.lse, grad.q, take);
  const Sums sums_v(s, grad.v, take);

  const Sum factor = Gradients::Products::score_factor(a);
  Sum* total = grad.lse;
  clear(total, s.queries);
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    g.score(a, s, t, key, count, a.grad_out, a.grad_out_strides);
    for (int64_t j = 0; j < count; ++j) {
      const Sum* weight = g.weights + j * s.queries;
      Sum* slope = g.slopes + j * s.queries;
#pragma omp simd
      for (int64_t m = 0; m < s.queries; ++m) {
        slope[m] *= weight[m];
        total[m] += slope[m];
        slope[m] *= factor;
      }
    }
    g.spread(a, s, t, key, count, a.grad_k);
    g.products.reduce(a, s, g.weights, g.many, count, sums_v);
  });
  g.sums_q.finish(a, s);
  sums_v.finish(a, s);
}

// The same without grad_q and grad_k; the room of grad_lse has lse.
template <class T, class Sum>
void average_chunk(const LookupScatterBackwardArgs& a, const LookupShape& s, const LookupTask& t,
                   const ChunkGrads<Sum>& grad) {
  const Sum factor = LookupOf<T>::Type::score_factor(a);
  load_lse(a, s, t, a.lse, grad.lse);
  reduce_chunk<T>(a, s, t, a.grad_out, a.grad_out_strides, grad.v, [&](int64_t count, Sum* scores, const auto&) {
    for (int64_t j = 0; j < count; ++j) weigh_by_lse(scores + j * s.queries, s.queries, factor, grad.lse);
  });
}

}  // namespace

void lookup_scatter_backward(const LookupScatterBackwardArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Element<T>::Sum;
    using Products = typename LookupOf<T>::Type;
    const LookupShape s = lookup_shape<Products>(a);
    const int64_t each = ChunkGrads<Sum>::size(s), rows = s.sums * s.padded;
    Arena arena;
    Sum* sums = arena.take<Sum>(a.images * a.heads * s.chunks * each);
    const auto grads_of = [&](const LookupTask& t) {
      return ChunkGrads<Sum>(task_sums(sums, a, s.chunks, t, each), s);
    };
    each_chunk(a, s, [&](const LookupTask& t) {
      if (a.grad_q) {
        differentiate_chunk<T>(a, s, t, grads_of(t));
      } else {
        average_chunk<T>(a, s, t, grads_of(t));
      }
    });
    if (a.grad_q) store_chunk_sums<T>(a, s, sums, each, 0, Products::sum_factor(a), a.grad_q);
    store_chunk_sums<T>(a, s, sums, each, rows, Sum(1), a.grad_v);
    for (int64_t pair = 0; pair < a.images * a.heads; ++pair) {
      LookupTask t{pair / a.heads, pair % a.heads, 0, 0, 0};
      const Sum* grad_v = grads_of(t).v;  // of all chunks now
      for (int64_t m = 0; m < a.compressed; ++m) {
        Sum total = 0;
        if (a.grad_q) {
          for (t.chunk = 0; t.chunk < s.chunks; ++t.chunk) total += grads_of(t).lse[m];
        } else {
          const T* v = strided_row<T>(a.v, a.v_strides, t, m);
          for (int64_t c = 0; c < a.channels; ++c) total += Element<T>::load(v[c]) * grad_v[m * s.padded + c];
        }
        static_cast<Sum*>(a.grad_lse)[head_start(a, t) + m] = -total;
      }
    }
  });
}

TOKRED_KERNELS_END
