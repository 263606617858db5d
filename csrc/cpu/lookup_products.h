// SPDX-License-Identifier: MIT
// The three products of lookup attention, with what belongs to the few queries of a head and to a block of its many
// keys packed for them:
//   score   block (keys, d) times few (M, d)^T
//   expand  weights (keys, M) times few (M, d)
//   reduce  onto sums (M, d): weights (keys, M)^T times block (keys, d)
#pragma once

#include "lookup_head.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// On vectors, in the type that sums are kept in.
template <class T>
struct VectorLookup {
  using Sum = typename Element<T>::Sum;
  // Keys of a block: whole tiles of every kind.
  static constexpr int64_t kTileKeys = std::lcm(kPanelRows, kRowRows);
  static constexpr int64_t kMostKeys = 144;
  static_assert(kMostKeys % kTileKeys == 0, "blocks must be made of whole tiles");
  // What a thread has to hold to use them.
  struct Means {};

  // The scale is in the queries: scores have it, and what is expanded with queries, not what is reduced.
  static Sum score_factor(const LookupProblem&) { return 1; }
  static Sum sum_factor(const LookupProblem& a) { return static_cast<Sum>(a.scale); }

  // What belongs to the queries of a head, (M, d), times `factor`, as rows and as panels.
  struct Few {
    Sum *rows, *panels;
    static int64_t size(const LookupShape& s) { return 2 * s.rows(); }

    template <class Take>
    Few(const LookupProblem& a, const LookupShape& s, const LookupTask& t, const void* data,
        const int64_t (&strides)[3], double factor, const Take& take)
        : rows(take(s.rows())), panels(take(s.rows())) {
      pack_rows(strided_row<T>(data, strides, t, 0), strides[2], a.compressed, a.channels, s.queries, s.padded, rows);
      for (int64_t i = 0; i < s.rows(); ++i) rows[i] *= static_cast<Sum>(factor);
      pack_panels(rows, s.queries, a.channels, s.padded, panels);
    }
  };

  // A block of keys, as rows; kScored and kReduced say what it will be used for.
  template <bool kScored, bool kReduced>
  struct Block {
    Sum* rows;
    static int64_t size(const LookupShape& s) { return s.block(); }
    template <class Take>
    Block(const LookupShape& s, const Take& take) : rows(take(s.block())) {}

    void load(const LookupProblem& a, const LookupShape& s, const LookupTask& t, int64_t first, int64_t count,
              const void* data, const int64_t (&strides)[3]) const {
      pack_rows(strided_row<T>(data, strides, t, first), strides[2], count, a.channels, s.keys, s.padded, rows);
    }
  };

  // Sums (M, d) of a chunk, added up in the output.
  struct Sums {
    Sum* rows;
    static int64_t size(const LookupShape&) { return 0; }
    template <class Take>
    Sums(const LookupShape& s, Sum* to, const Take&) : rows(to) {
      clear(rows, s.sums * s.padded);
    }

    void shrink(const LookupProblem& a, const LookupShape& s, const Sum* factors) const {
      for (int64_t m = 0; m < a.compressed; ++m) {
        Sum* row = rows + m * s.padded;
#pragma omp simd
        for (int64_t c = 0; c < s.padded; ++c) row[c] *= factors[m];
      }
    }
    void finish(const LookupProblem&, const LookupShape&) const {}
  };

  static int64_t size(const LookupShape&) { return 0; }
  template <class Take>
  VectorLookup(const LookupShape&, const Take&) {}

  template <class Many>
  void score(const LookupProblem& a, const LookupShape& s, const Many& many, const Few& few, int64_t count,
             Sum* scores) const {
    multiply_panels(many.rows, s.padded, few.panels, a.channels, s.queries, scores, count);
  }
  void expand(const LookupProblem& a, const LookupShape& s, const Sum* weights, const Few& few, int64_t count,
              Sum* out) const {
    multiply_rows(weights, s.queries, few.rows, a.compressed, s.padded, out, count);
  }
  template <class Many>
  void reduce(const LookupProblem& a, const LookupShape& s, const Sum* weights, const Many& many, int64_t count,
              const Sums& sums) const {
    add_outer(weights, s.queries, a.compressed, many.rows, s.padded, sums.rows, count);
  }
};

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA

#if defined(__AMX_BF16__)
#include "lookup_amx.h"
#endif

namespace tokred::cpu::TOKRED_ISA {
namespace {

// What serves elements of a type.
template <class T>
struct LookupOf {
  using Type = VectorLookup<T>;
};
#if defined(__AMX_BF16__)
template <>
struct LookupOf<BFloat16> {
  using Type = TileLookup;
};
#endif

// Onto sums (M, d) of a chunk: of each block of keys the weights, which weigh(count, scores, sums) makes of the scores
// in place, times the rows of `data`.
template <class T, class Sum, class Weigh>
void reduce_chunk(const LookupProblem& a, const LookupShape& s, const LookupTask& t, const void* data,
                  const int64_t (&strides)[3], Sum* to, const Weigh& weigh) {
  using Products = typename LookupOf<T>::Type;
  using Keys = typename Products::template Block<true, false>;
  using Many = typename Products::template Block<false, true>;
  using Sums = typename Products::Sums;
  thread_local Arena arena;
  Sum* next = arena.take<Sum>(Products::Few::size(s) + Products::size(s) + Keys::size(s) + Many::size(s) +
                              Sums::size(s) + s.weights());
  const auto take = [&](int64_t values) { return std::exchange(next, next + values); };
  const typename Products::Few queries(a, s, t, a.q, a.q_strides, a.scale, take);
  const Products products(s, take);
  const Keys keys(s, take);
  const Many many(s, take);
  const Sums sums(s, to, take);
  Sum* weights = take(s.weights());

  [[maybe_unused]] const typename Products::Means means;
  each_key_block(s, t, [&](int64_t key, int64_t count) {
    keys.load(a, s, t, key, count, a.k, a.k_strides);
    many.load(a, s, t, key, count, data, strides);
    products.score(a, s, keys, queries, count, weights);
    weigh(count, weights, sums);
    products.reduce(a, s, weights, many, count, sums);
  });
  sums.finish(a, s);
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
