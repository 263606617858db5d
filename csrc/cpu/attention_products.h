// SPDX-License-Identifier: MIT
// The two products of a head's attention: its scores, and its weights times its values. Keys and values are packed
// once, queries and weights a block of kQueries at a time.
#pragma once

#include "attention_head.h"
#if defined(__AMX_BF16__)
#include "amx_tiles.h"
#endif

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Rows (N, d) of a head, at a stride.
template <class T>
struct HeadRows {
  const T* first;
  int64_t stride;
};

// On vectors, in the type that sums are kept in.
template <class T>
class VectorProducts {
 public:
  using Sum = typename Element<T>::Sum;
  static constexpr int64_t kQueries = kQueryBlock;

  static int64_t size(const HeadShape& s) { return s.keys * (s.padded + s.channels) + 2 * kQueries * s.padded; }
  static int64_t out_stride(const HeadShape& s) { return s.padded; }

  // `memory` has room for size(s).
  VectorProducts(const HeadShape& s, HeadRows<T> keys, HeadRows<T> values, Sum* memory)
      : s_(s),
        values_(memory),
        key_panels_(values_ + s.keys * s.padded),
        queries_(key_panels_ + s.keys * s.channels),
        out_(queries_ + kQueries * s.padded) {
    // The keys lie as rows only until they are panels; then the values take their place.
    pack_rows(keys.first, keys.stride, s.tokens, s.channels, s.keys, s.padded, values_);
    pack_panels(values_, s.keys, s.channels, s.padded, key_panels_);
    pack_rows(values.first, values.stride, s.tokens, s.channels, s.keys, s.padded, values_);
  }

  // scores (kQueries, keys) of `count` queries.
  void score(HeadRows<T> queries, int64_t count, Sum* scores) const {
    pack_rows(queries.first, queries.stride, count, s_.channels, kQueries, s_.padded, queries_);
    multiply_panels(queries_, s_.padded, key_panels_, s_.channels, s_.keys, scores, count);
  }

  // (kQueries, out_stride): weights (kQueries, keys) times values.
  const Sum* average(const Sum* weights, int64_t count) const {
    multiply_rows(weights, s_.keys, values_, s_.tokens, s_.padded, out_, count);
    return out_;
  }

 private:
  const HeadShape& s_;
  Sum *values_, *key_panels_, *queries_, *out_;
};

#if defined(__AMX_BF16__)
// In AMX tiles. Products of bfloat16 are exact in float32; the weights are rounded to bfloat16.
class TileProducts {
 public:
  using Sum = float;
  static constexpr int64_t kQueries = 2 * kTileRows;

  static int64_t size(const HeadShape& s) {
    const int64_t values = s.keys * depth(s) + steps(s) * out_stride(s) + kQueries * (depth(s) + steps(s));
    return values * sizeof(BFloat16) / sizeof(float) + kQueries * out_stride(s);
  }
  static int64_t out_stride(const HeadShape& s) { return round_up(s.channels, kTileColumns); }

  TileProducts(const HeadShape& s, HeadRows<BFloat16> keys, HeadRows<BFloat16> values, float* memory)
      : s_(s),
        key_panels_(reinterpret_cast<uint32_t*>(memory)),
        value_panels_(key_panels_ + s.keys * depth(s) / 2),
        queries_(reinterpret_cast<BFloat16*>(value_panels_ + steps(s) * out_stride(s) / 2)),
        weights_(queries_ + kQueries * depth(s)),
        out_(reinterpret_cast<float*>(weights_ + kQueries * steps(s))) {
    pack_amx_transposed(keys.first, keys.stride, s.tokens, s.channels, s.keys, key_panels_);
    pack_amx_panels(values.first, values.stride, s.tokens, s.channels, steps(s), value_panels_);
    clear(weights_, kQueries * steps(s));
  }

  void score(HeadRows<BFloat16> queries, int64_t count, float* scores) const {
    pack_amx_rows(queries.first, queries.stride, count, s_.channels, rows(count), depth(s_), queries_);
    multiply_amx(queries_, depth(s_), rows(count), key_panels_, depth(s_), s_.keys, scores, s_.keys);
  }

  const float* average(const float* weights, int64_t count) const {
    for (int64_t m = 0; m < count; ++m) round_amx(weights + m * s_.keys, s_.keys, weights_ + m * steps(s_));
    multiply_amx(weights_, steps(s_), rows(count), value_panels_, steps(s_), out_stride(s_), out_, out_stride(s_));
    return out_;
  }

 private:
  static int64_t depth(const HeadShape& s) { return round_up(s.channels, kTileSteps); }
  static int64_t steps(const HeadShape& s) { return round_up(s.keys, kTileSteps); }
  static int64_t rows(int64_t count) { return round_up(count, kTileRows); }

  Tiles tiles_;
  const HeadShape& s_;
  uint32_t *key_panels_, *value_panels_;
  BFloat16 *queries_, *weights_;
  float* out_;
};
#endif

// What serves elements of a type.
template <class T>
struct ProductsOf {
  using Type = VectorProducts<T>;
};
#if defined(__AMX_BF16__)
template <>
struct ProductsOf<BFloat16> {
  using Type = TileProducts;
};
#endif

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
