// SPDX-License-Identifier: MIT
// Cosine scores in register tiles, of which only the running best of each source is kept.
#pragma once

#include "match_load.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// The best so far of each source of a tile, a candidate a lane.
struct Best {
  FloatVector score[kTileSources];
  IndexVector index[kTileSources];
};

// Scores kPanels panels of destinations, from destination j on, against a tile of sources.
// Not inlined: GCC then keeps all of the scores in registers.
template <int kPanels>
__attribute__((noinline)) void scan_panels(const Match& p, const float* source, const float* inverse_src, int64_t j,
                                           Best& best) {
  FloatVector score[kTileSources][kPanels] = {};
  const float* panel = p.destination + j * p.channels;
  const int64_t panel_size = p.channels * kLanes;
  for (int64_t d = 0; d < p.channels; ++d) {
    FloatVector b[kPanels];
#pragma GCC unroll 3
    for (int v = 0; v < kPanels; ++v) {
      b[v] = *reinterpret_cast<const FloatVector*>(panel + v * panel_size + d * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTileSources; ++m) {
      const float s = source[m * p.channels + d];
#pragma GCC unroll 3
      for (int v = 0; v < kPanels; ++v) score[m][v] += s * b[v];
    }
  }
  IndexVector lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
#pragma GCC unroll 3
  for (int v = 0; v < kPanels; ++v) {
    const FloatVector scale = *reinterpret_cast<const FloatVector*>(p.inverse_dst + j + v * kLanes);
    const IndexVector number = lane + static_cast<int32_t>(j + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kTileSources; ++m) {
      const FloatVector s = score[m][v] * inverse_src[m] * scale;
      // Numbers only grow along a lane, so "greater" alone leaves the lower one at a tie; NaN is never greater.
      const IndexVector wins = s > best.score[m];
      best.score[m] = wins ? s : best.score[m];
      best.index[m] = wins ? number : best.index[m];
    }
  }
}

// The best of a source's lanes: the greatest, and of equals the one with the lowest number.
void best_of_lanes(FloatVector scores, IndexVector numbers, float& best, int32_t& number) {
  float score[kLanes];
  int32_t index[kLanes];
  std::memcpy(score, &scores, sizeof(score));
  std::memcpy(index, &numbers, sizeof(index));
  best = score[0];
  number = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(max : best)
  for (int l = 0; l < kLanes; ++l) best = score[l] > best ? score[l] : best;
#pragma omp simd reduction(min : number)
  for (int l = 0; l < kLanes; ++l) {
    const int32_t candidate = score[l] == best ? index[l] : std::numeric_limits<int32_t>::max();
    number = candidate < number ? candidate : number;
  }
}

// The best of a pass against all destinations. A few panels serve all of it before the next few are fetched.
void best_of_pass(const Match& p, int32_t first_number, int64_t from, const Pass& pass) {
  const int64_t number = std::min<int64_t>(kPassSources, p.sources - from);
  Best best[kPassTiles];
  for (Best& one : best) {
    for (FloatVector& score : one.score) score = FloatVector{} - std::numeric_limits<float>::infinity();
    for (IndexVector& index : one.index) index = IndexVector{};
  }
  const auto scan = [&](auto scan_tile, int64_t panel) {
    for (int64_t m = 0; m < number; m += kTileSources) {
      scan_tile(p, pass.source + m * p.channels, pass.inverse + m, panel * kLanes, best[m / kTileSources]);
    }
  };
  int64_t panel = 0;
  for (; panel + kTilePanels <= p.panels; panel += kTilePanels) scan(scan_panels<kTilePanels>, panel);
  if (p.panels - panel == 2) scan(scan_panels<2>, panel);
  if (p.panels - panel == 1) scan(scan_panels<1>, panel);

  for (int64_t m = 0; m < number; ++m) {
    const Best& tile = best[m / kTileSources];
    const int64_t row = m % kTileSources, i = from + m;
    best_of_lanes(tile.score[row], tile.index[row], p.score[i], p.partner[i]);
    p.partner[i] += first_number;
  }
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
