// SPDX-License-Identifier: MIT
// Lookup attention, scatter: a block of lookup tokens gets its rows from all compressed tokens, weights made anew.
#include "lookup_head.h"

TOKRED_KERNELS_BEGIN
namespace {

template <class T>
void scatter_chunk(const LookupScatterArgs& a, const LookupShape& s, const LookupTask& t) {
  using Sum = typename Element<T>::Sum;
  const int64_t block = kKeyBlock * s.padded, all = s.queries * s.padded;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(2 * all + 2 * block + kKeyBlock * a.channels + kQueryBlock * kKeyBlock);
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  Sum *queries = take(all), *values = take(all), *keys = take(block), *out = take(block);
  Sum *panels = take(kKeyBlock * a.channels), *weights = take(kQueryBlock * kKeyBlock);
  const Sum scale = static_cast<Sum>(a.scale);
  const Sum* lse = static_cast<const Sum*>(a.lse) + head_start(a, t);

  pack_rows(strided_row<T>(a.q, a.q_strides, t, 0), a.q_strides[2], a.compressed, a.channels, s.queries, s.padded,
            queries);
  pack_rows(strided_row<T>(a.v, a.v_strides, t, 0), a.v_strides[2], a.compressed, a.channels, s.queries, s.padded,
            values);
  each_key_block(t, [&](int64_t key, int64_t number) {
    pack_rows(strided_row<T>(a.k, a.k_strides, t, key), a.k_strides[2], number, a.channels, kKeyBlock, s.padded, keys);
    pack_panels(keys, kKeyBlock, a.channels, s.padded, panels);
    clear(out, block);
    NextRows<T> next_keys(a, t, key, a.k, a.k_strides);
    each_query_block(a, [&](int64_t query, int64_t count) {
      multiply_panels(queries + query * s.padded, s.padded, panels, a.channels, kKeyBlock, weights, count);
      for (int64_t m = 0; m < count; ++m) {
        next_keys.fetch_some();
        weigh_by_lse(weights + m * kKeyBlock, number, scale, lse[query + m]);
      }
      add_outer(weights, kKeyBlock, number, values + query * s.padded, s.padded, out, count);
    });
    store_key_rows<T>(a, s, t, key, number, out, Sum(1), a.out);
  });
}

}  // namespace

void lookup_scatter(const LookupScatterArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const LookupShape s = lookup_shape<typename Element<T>::Sum>(a);
    each_chunk(a, s.chunks, [&](const LookupTask& t) { scatter_chunk<T>(a, s, t); });
  });
}

TOKRED_KERNELS_END
