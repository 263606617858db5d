// SPDX-License-Identifier: MIT
// Lookup attention, scatter: a block of lookup tokens gets its rows from all compressed tokens, weights made anew.
#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T>
void scatter_chunk(const LookupScatterArgs& a, const LookupShape& s, const LookupTask& t) {
  using Sum = typename Element<T>::Sum;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(4 * s.rows() + s.queries + 2 * s.block() + s.weights());
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  const Few<T, Sum> queries(a, s, t, a.q, a.q_strides, static_cast<Sum>(a.scale), take);
  const Few<T, Sum> values(a, s, t, a.v, a.v_strides, Sum(1), take);
  Sum *lse = take(s.queries), *keys = take(s.block()), *out = take(s.block()), *weights = take(s.weights());

  load_lse(a, s, t, a.lse, lse);
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    pack_block<T>(a, s, t, key, count, a.k, a.k_strides, keys);
    multiply_panels(keys, s.padded, queries.panels, a.channels, s.queries, weights, count);
    for (int64_t j = 0; j < count; ++j) {
      weigh_by_lse(weights + j * s.queries, s.queries, lse);
    }
    multiply_rows(weights, s.queries, values.rows, a.compressed, s.padded, out, count);
    store_key_rows<T>(a, s, t, key, count, out, a.out);
  });
}

}  // namespace

void lookup_scatter(const LookupScatterArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const LookupShape s = lookup_shape<typename Element<T>::Sum>(a);
    each_chunk(a, s, [&](const LookupTask& t) { scatter_chunk<T>(a, s, t); });
  });
}

TOKRED_KERNELS_END
