// SPDX-License-Identifier: MIT
// The five products of a head's gradients. Keys and values are packed once, queries with their gradients a block of
// kQueries at a time; what keys and values get is added up over the blocks.
#pragma once

#include <utility>

#include "attention_head.h"
#include "attention_products.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// On vectors, in the type that sums are kept in.
template <class T>
class VectorGradients {
 public:
  using Sum = typename Element<T>::Sum;
  static constexpr int64_t kQueries = kQueryBlock;

  static int64_t size(const HeadShape& s) { return s.keys * (3 * s.padded + 2 * s.channels) + 3 * kQueries * s.padded; }
  static int64_t stride(const HeadShape& s) { return s.padded; }

  // `take` gives memory, of size(s) in all.
  template <class Take>
  VectorGradients(const HeadShape& s, HeadRows<T> keys, HeadRows<T> values, const Take& take)
      : s_(s),
        keys_(take(s.keys * s.padded)),
        grad_keys_(take(s.keys * s.padded)),
        grad_values_(take(s.keys * s.padded)),
        key_panels_(take(s.keys * s.channels)),
        value_panels_(take(s.keys * s.channels)),
        queries_(take(kQueries * s.padded)),
        grad_out_(take(kQueries * s.padded)),
        grad_queries_(take(kQueries * s.padded)) {
    // The values lie as rows only until they are panels; then the keys take their place, and stay.
    pack_rows(values.first, values.stride, s.tokens, s.channels, s.keys, s.padded, keys_);
    pack_panels(keys_, s.keys, s.channels, s.padded, value_panels_);
    pack_rows(keys.first, keys.stride, s.tokens, s.channels, s.keys, s.padded, keys_);
    pack_panels(keys_, s.keys, s.channels, s.padded, key_panels_);
    clear(grad_keys_, s.keys * s.padded);
    clear(grad_values_, s.keys * s.padded);
  }

  // For a block of queries, writes scores = q k^T and grads = grad_out v^T, both (kQueries, keys).
  void score(HeadRows<T> queries, HeadRows<T> grad_out, int64_t count, Sum* scores, Sum* grads) const {
    pack_rows(queries.first, queries.stride, count, s_.channels, kQueries, s_.padded, queries_);
    pack_rows(grad_out.first, grad_out.stride, count, s_.channels, kQueries, s_.padded, grad_out_);
    multiply_panels(queries_, s_.padded, key_panels_, s_.channels, s_.keys, scores, count);
    multiply_panels(grad_out_, s_.padded, value_panels_, s_.channels, s_.keys, grads, count);
  }

  // From the block's weights and the gradients of its scores: adds to what keys and values get, and returns what its
  // queries do, (kQueries, stride).
  const Sum* spread(const Sum* weights, const Sum* slopes, int64_t count) const {
    multiply_rows(slopes, s_.keys, keys_, s_.tokens, s_.padded, grad_queries_, count);
    add_outer(slopes, s_.keys, s_.tokens, queries_, s_.padded, grad_keys_, count);
    add_outer(weights, s_.keys, s_.tokens, grad_out_, s_.padded, grad_values_, count);
    return grad_queries_;
  }

  // (tokens, stride), each until the next call.
  const Sum* grad_keys() const { return grad_keys_; }
  const Sum* grad_values() const { return grad_values_; }

 private:
  const HeadShape& s_;
  Sum *keys_, *grad_keys_, *grad_values_, *key_panels_, *value_panels_, *queries_, *grad_out_, *grad_queries_;
};

#if defined(__AMX_BF16__)
// In AMX tiles. Weights and the gradients of scores are rounded to bfloat16; what keys and values get is added up as
// (d, keys).
class TileGradients {
 public:
  using Sum = float;
  static constexpr int64_t kQueries = 2 * kTileSteps;

  static int64_t size(const HeadShape& s) {
    return (2 * s.keys + 4 * kQueries) * depth(s) / 2 + (steps(s) * stride(s) + kQueries * (steps(s) + s.keys)) / 2 +
           (3 * s.keys + kQueries) * stride(s);
  }
  static int64_t stride(const HeadShape& s) { return round_up(s.channels, kTileColumns); }

  template <class Take>
  TileGradients(const HeadShape& s, HeadRows<BFloat16> keys, HeadRows<BFloat16> values, const Take& take)
      : s_(s),
        turned_keys_(words(take, s.keys * depth(s))),
        turned_values_(words(take, s.keys * depth(s))),
        keys_(words(take, steps(s) * stride(s))),
        queries_(halves(take, kQueries * depth(s))),
        grad_out_(halves(take, kQueries * depth(s))),
        query_columns_(halves(take, kQueries * depth(s))),
        grad_out_columns_(halves(take, kQueries * depth(s))),
        rounded_(halves(take, kQueries * steps(s))),
        rounded_panels_(words(take, kQueries * s.keys)),
        grad_keys_(take(s.keys * stride(s))),
        grad_values_(take(s.keys * stride(s))),
        rows_(take(s.keys * stride(s))),
        grad_queries_(take(kQueries * stride(s))) {
    pack_amx_transposed(keys.first, keys.stride, s.tokens, s.channels, s.keys, turned_keys_);
    pack_amx_transposed(values.first, values.stride, s.tokens, s.channels, s.keys, turned_values_);
    pack_amx_panels(keys.first, keys.stride, s.tokens, s.channels, steps(s), keys_);
    clear(rounded_, kQueries * steps(s));
    clear(grad_keys_, s.keys * stride(s));
    clear(grad_values_, s.keys * stride(s));
  }

  void score(HeadRows<BFloat16> queries, HeadRows<BFloat16> grad_out, int64_t count, float* scores,
             float* grads) const {
    load(queries, count, queries_, query_columns_);
    load(grad_out, count, grad_out_, grad_out_columns_);
    multiply_amx(queries_, depth(s_), rows(count), turned_keys_, depth(s_), s_.keys, scores, s_.keys);
    multiply_amx(grad_out_, depth(s_), rows(count), turned_values_, depth(s_), s_.keys, grads, s_.keys);
  }

  const float* spread(const float* weights, const float* slopes, int64_t count) const {
    for (int64_t m = 0; m < count; ++m) round_amx(slopes + m * s_.keys, s_.keys, rounded_ + m * steps(s_));
    multiply_amx(rounded_, steps(s_), rows(count), keys_, steps(s_), stride(s_), grad_queries_, stride(s_));
    add(slopes, count, query_columns_, grad_keys_);
    add(weights, count, grad_out_columns_, grad_values_);
    return grad_queries_;
  }

  const float* grad_keys() const { return turn(grad_keys_); }
  const float* grad_values() const { return turn(grad_values_); }

 private:
  static int64_t depth(const HeadShape& s) { return round_up(s.channels, kTileSteps); }
  static int64_t steps(const HeadShape& s) { return round_up(s.keys, kTileSteps); }
  static int64_t rows(int64_t count) { return round_up(count, kTileRows); }

  // Memory for so many bfloat16.
  template <class Take>
  static BFloat16* halves(const Take& take, int64_t number) {
    return reinterpret_cast<BFloat16*>(take(number / 2));
  }
  template <class Take>
  static uint32_t* words(const Take& take, int64_t number) {
    return reinterpret_cast<uint32_t*>(take(number / 2));
  }

  void load(HeadRows<BFloat16> from, int64_t count, BFloat16* to, BFloat16* columns) const {
    pack_amx_rows(from.first, from.stride, count, s_.channels, kQueries, depth(s_), to);
    pack_amx_columns(from.first, from.stride, count, s_.channels, kQueries, columns);
  }
  // sums (d, keys) += columns (d, queries) times values (queries, keys).
  void add(const float* values, int64_t count, const BFloat16* columns, float* sums) const {
    round_amx_panels(values, count, s_.keys, kQueries, rounded_panels_);
    multiply_amx<true>(columns, kQueries, stride(s_), rounded_panels_, kQueries, s_.keys, sums, s_.keys);
  }
  const float* turn(const float* sums) const {
    for (int64_t j = 0; j < s_.tokens; ++j) {
      for (int64_t c = 0; c < s_.channels; ++c) rows_[j * stride(s_) + c] = sums[c * s_.keys + j];
    }
    return rows_;
  }

  Tiles tiles_;
  const HeadShape& s_;
  uint32_t *turned_keys_, *turned_values_, *keys_;
  BFloat16 *queries_, *grad_out_, *query_columns_, *grad_out_columns_, *rounded_;
  uint32_t* rounded_panels_;
  float *grad_keys_, *grad_values_, *rows_, *grad_queries_;
};
#endif

// What serves elements of a type.
template <class T>
struct GradientsOf {
  using Type = VectorGradients<T>;
};
#if defined(__AMX_BF16__)
template <>
struct GradientsOf<BFloat16> {
  using Type = TileGradients;
};
#endif

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
