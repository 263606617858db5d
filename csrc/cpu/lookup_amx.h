// SPDX-License-Identifier: MIT
// The products of lookup attention of bfloat16 in AMX tiles. Weights are rounded to bfloat16 before they are
// multiplied.
#pragma once

#include "amx_tiles.h"
#include "lookup_head.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

struct TileLookup {
  using Sum = float;
  static constexpr int64_t kTileKeys = kTileSteps;
  static constexpr int64_t kMostKeys = 4 * kTileSteps;
  using Means = Tiles;

  // Rounded queries must not be scaled, so that scores are, and their gradients.
  static float score_factor(const LookupProblem& a) { return static_cast<float>(a.scale); }
  static float sum_factor(const LookupProblem&) { return 1; }

  // Channels and queries, padded to whole tiles of steps.
  static int64_t depth(const LookupShape& s) { return round_up(s.padded, kTileSteps); }
  static int64_t steps(const LookupShape& s) { return round_up(s.queries, kTileSteps); }

  // What belongs to the queries of a head, (M, d), as the panels of its transpose and of itself.
  struct Few {
    uint32_t *transposed, *panels;
    static int64_t size(const LookupShape& s) { return depth(s) / 2 * s.queries + steps(s) / 2 * s.padded; }

    template <class Take>
    Few(const LookupProblem& a, const LookupShape& s, const LookupTask& t, const void* data,
        const int64_t (&strides)[3], double, const Take& take)
        : transposed(reinterpret_cast<uint32_t*>(take(depth(s) / 2 * s.queries))),
          panels(reinterpret_cast<uint32_t*>(take(steps(s) / 2 * s.padded))) {
      const BFloat16* rows = strided_row<BFloat16>(data, strides, t, 0);
      pack_amx_transposed(rows, strides[2], a.compressed, a.channels, s.queries, transposed);
      pack_amx_panels(rows, strides[2], a.compressed, a.channels, steps(s), panels);
    }
  };

  // A block of keys: as rows to be scored, as columns to be reduced.
  template <bool kScored, bool kReduced>
  struct Block {
    BFloat16 *rows = nullptr, *columns = nullptr;
    static int64_t half(const LookupShape& s) { return s.keys * depth(s) / 2; }
    static int64_t size(const LookupShape& s) { return (kScored + kReduced) * half(s); }

    template <class Take>
    Block(const LookupShape& s, const Take& take) {
      if constexpr (kScored) rows = reinterpret_cast<BFloat16*>(take(half(s)));
      if constexpr (kReduced) columns = reinterpret_cast<BFloat16*>(take(half(s)));
    }
    void load(const LookupProblem& a, const LookupShape& s, const LookupTask& t, int64_t first, int64_t count,
              const void* data, const int64_t (&strides)[3]) const {
      const BFloat16* from = strided_row<BFloat16>(data, strides, t, first);
      if constexpr (kScored) pack_amx_rows(from, strides[2], count, a.channels, s.keys, depth(s), rows);
      if constexpr (kReduced) pack_amx_columns(from, strides[2], count, a.channels, s.keys, columns);
    }
  };

  // Sums of a chunk, added up as (d, M) and turned at the end.
  struct Sums {
    float *rows, *turned;
    static int64_t size(const LookupShape& s) { return s.padded * s.queries; }
    template <class Take>
    Sums(const LookupShape& s, float* to, const Take& take) : rows(to), turned(take(size(s))) {
      clear(turned, size(s));
    }

    void shrink(const LookupProblem& a, const LookupShape& s, const float* factors) const {
      for (int64_t c = 0; c < a.channels; ++c) {
        float* row = turned + c * s.queries;
#pragma omp simd
        for (int64_t m = 0; m < s.queries; ++m) row[m] *= factors[m];
      }
    }
    void finish(const LookupProblem& a, const LookupShape& s) const {
      for (int64_t m = 0; m < a.compressed; ++m) {
        for (int64_t c = 0; c < s.padded; ++c) rows[m * s.padded + c] = turned[c * s.queries + m];
      }
    }
  };

  static int64_t size(const LookupShape& s) { return s.keys * steps(s) / 2 + s.keys / 2 * s.queries; }
  template <class Take>
  TileLookup(const LookupShape& s, const Take& take)
      : rounded_(reinterpret_cast<BFloat16*>(take(s.keys * steps(s) / 2))),
        panels_(reinterpret_cast<uint32_t*>(take(s.keys / 2 * s.queries))) {
    clear(rounded_, s.keys * steps(s));
  }

  template <class Many>
  void score(const LookupProblem&, const LookupShape& s, const Many& many, const Few& few, int64_t count,
             float* scores) const {
    multiply_amx(many.rows, depth(s), round_up(count, kTileRows), few.transposed, depth(s), s.queries, scores,
                 s.queries);
  }
  void expand(const LookupProblem&, const LookupShape& s, const float* weights, const Few& few, int64_t count,
              float* out) const {
    for (int64_t j = 0; j < count; ++j) round_amx(weights + j * s.queries, s.queries, rounded_ + j * steps(s));
    multiply_amx(rounded_, steps(s), round_up(count, kTileRows), few.panels, steps(s), s.padded, out, s.padded);
  }
  template <class Many>
  void reduce(const LookupProblem&, const LookupShape& s, const float* weights, const Many& many, int64_t count,
              const Sums& sums) const {
    round_amx_panels(weights, count, s.queries, s.keys, panels_);
    multiply_amx<true>(many.columns, s.keys, s.padded, panels_, s.keys, s.queries, sums.turned, s.queries);
  }

 private:
  BFloat16* rounded_;
  uint32_t* panels_;
};

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
