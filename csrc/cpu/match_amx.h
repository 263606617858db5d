// SPDX-License-Identifier: MIT
// Cosine scores of bfloat16 in AMX tiles: exact products, summed in float32 as on vectors.
#pragma once

#include "amx_tiles.h"
#include "match_best.h"
#include "match_load.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Destinations lie in panels of words, and a thread's sources in rows.
struct TileScores {
  using Means = Tiles;
  static constexpr int64_t kSpeed = 4;  // measured, in that of vectors
  static_assert(kLanes == kTileColumns, "a panel of destinations is a vector of them and a tile");
  static_assert(kPassSources % kTileRows == 0, "a pass must be made of whole tiles");
  // Panels whose scores are at hand together, in the first-level cache.
  static constexpr int64_t kPanelsAtOnce = 8;
  static constexpr int64_t kScores = kPanelsAtOnce * kTileColumns;  // of a source

  static int64_t panel_size(int64_t channels) { return depth(channels) / 2 * kTileColumns; }
  static int64_t pass_size(int64_t channels) {
    return kPassSources * (kScores + depth(channels) / 2 + 1) + round_up(channels, kTileColumns);
  }

  // A thread's memory.
  struct Pass {
    float *scores, *inverse, *row;
    BFloat16* rows;
    Pass(float* memory, int64_t channels)
        : scores(memory),
          inverse(scores + kPassSources * kScores),
          row(inverse + kPassSources),
          rows(reinterpret_cast<BFloat16*>(row + round_up(channels, kTileColumns))) {}
  };

  static void load_panel(const MatchProblem& a, const Image& image, const Match& p, int64_t panel, float* memory) {
    const Pass pass(memory, p.channels);
    const int64_t padded = depth(p.channels);
    for (int lane = 0; lane < kTileColumns; ++lane) {
      const int64_t j = panel * kTileColumns + lane;
      p.inverse_dst[j] = load_destination<BFloat16>(a, image, p, j, pass.row);
      shorten(pass.row, p.channels, pass.rows + lane * padded);
    }
    uint32_t* out = reinterpret_cast<uint32_t*>(p.destination + panel * panel_size(p.channels));
    pack_amx_transposed(pass.rows, padded, kTileColumns, p.channels, kTileColumns, out);
  }

  static void best_of_pass(const MatchProblem& a, const Image& image, const Match& p, int64_t from, float* memory,
                           Best* best) {
    const Pass pass(memory, p.channels);
    const int64_t padded = depth(p.channels), number = std::min<int64_t>(kPassSources, p.sources - from);
    for (int64_t m = 0; m < kPassSources; ++m) {
      pass.inverse[m] = load_source<BFloat16>(a, image, p, from + m, pass.row);
      shorten(pass.row, p.channels, pass.rows + m * padded);
    }
    for (int64_t panel = 0; panel < p.panels; panel += kPanelsAtOnce) {
      const int64_t panels = std::min(kPanelsAtOnce, p.panels - panel), j = panel * kTileColumns;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(p.destination + panel * panel_size(p.channels));
      multiply_amx(pass.rows, padded, round_up(number, kTileRows), words, padded, panels * kTileColumns, pass.scores,
                   kScores);
      for (int64_t m = 0; m < number; ++m) {
        Best kept = best[m];
        IndexVector numbers = numbers_from(j);
        for (int64_t v = 0; v < panels; ++v, numbers += kTileColumns) {
          const auto score = *reinterpret_cast<const FloatVector*>(pass.scores + m * kScores + v * kTileColumns);
          const auto scale = *reinterpret_cast<const FloatVector*>(p.inverse_dst + j + v * kTileColumns);
          kept.meet(score * pass.inverse[m] * scale, numbers);
        }
        best[m] = kept;
      }
    }
  }

 private:
  static int64_t depth(int64_t channels) { return round_up(channels, kTileSteps); }

  // Floats that are bfloat16 already, as such, zeros behind them.
  static void shorten(const float* row, int64_t channels, BFloat16* to) {
#pragma omp simd
    for (int64_t d = 0; d < channels; ++d) to[d].bits = static_cast<uint16_t>(bits_as<uint32_t>(row[d]) >> 16);
    std::fill(to + channels, to + depth(channels), BFloat16{0});
  }
};

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
