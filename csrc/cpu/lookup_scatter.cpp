// SPDX-License-Identifier: MIT
// Lookup attention, scatter: a block of lookup tokens gets its rows from all compressed tokens, weights made anew.
#include "lookup_products.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T>
void scatter_chunk(const LookupScatterArgs& a, const LookupShape& s, const LookupTask& t) {
  using Sum = typename Element<T>::Sum;
  using Products = typename LookupOf<T>::Type;
  using Keys = typename Products::template Block<true, false>;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(2 * Products::Few::size(s) + Products::size(s) + Keys::size(s) + s.queries + s.block() +
                              s.weights());
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  const typename Products::Few queries(a, s, t, a.q, a.q_strides, a.scale, take);
  const typename Products::Few values(a, s, t, a.v, a.v_strides, 1, take);
  const Products products(s, take);
  const Keys keys(s, take);
  Sum *lse = take(s.queries), *out = take(s.block()), *weights = take(s.weights());
  const Sum factor = Products::score_factor(a);

  [[maybe_unused]] const typename Products::Means means;
  load_lse(a, s, t, a.lse, lse);
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    keys.load(a, s, t, key, count, a.k, a.k_strides);
    products.score(a, s, keys, queries, count, weights);
    for (int64_t j = 0; j < count; ++j) weigh_by_lse(weights + j * s.queries, s.queries, factor, lse);
    products.expand(a, s, weights, values, count, out);
    store_key_rows<T>(a, s, t, key, count, out, a.out);
  });
}

}  // namespace

void lookup_scatter(const LookupScatterArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const LookupShape s = lookup_shape<typename LookupOf<T>::Type>(a);
    each_chunk(a, s, [&](const LookupTask& t) { scatter_chunk<T>(a, s, t); });
  });
}

TOKRED_KERNELS_END
