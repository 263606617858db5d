// SPDX-License-Identifier: MIT
// Cosine scores in register tiles; only the running best of each source is kept.
#pragma once

#include "match_best.h"
#include "match_load.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// A register tile: kTileSources rows times kTilePanels vectors of destinations. With AVX-512 24 of 32 registers hold
// scores, with 16 registers 12 do; the rest are the loaded destinations and one broadcast source.
constexpr int kTileSources = kLanes == 16 ? 8 : 4;
constexpr int kTilePanels = 3;

// Scores kPanels panels of destinations, from destination j on, against a tile of sources.
// Not inlined: GCC then keeps all of the scores in registers.
template <int kPanels>
__attribute__((noinline)) void scan_panels(const Match& p, const float* source, const float* inverse_src, int64_t j,
                                           Best* best) {
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
#pragma GCC unroll 3
  for (int v = 0; v < kPanels; ++v) {
    const FloatVector scale = *reinterpret_cast<const FloatVector*>(p.inverse_dst + j + v * kLanes);
    const IndexVector numbers = numbers_from(j + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kTileSources; ++m) best[m].meet(score[m][v] * inverse_src[m] * scale, numbers);
  }
}

// Destinations lie in panels (D, lane), and a thread's sources in rows.
template <class T>
struct VectorScores {
  // What a thread has to hold to use them.
  struct Means {};
  static constexpr int64_t kSpeed = 1;

  static int64_t panel_size(int64_t channels) { return channels * kLanes; }  // in floats
  static int64_t pass_size(int64_t channels) { return kPassSources * (channels + 1); }

  // `memory` has room for pass_size.
  static void load_panel(const MatchProblem& a, const Image& image, const Match& p, int64_t panel, float* memory) {
    float* out = p.destination + panel * p.channels * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t j = panel * kLanes + lane;
      p.inverse_dst[j] = load_destination<T>(a, image, p, j, memory);
      for (int64_t d = 0; d < p.channels; ++d) out[d * kLanes + lane] = memory[d];
    }
  }

  // The best of kPassSources sources against all destinations. A few panels serve all before the next are fetched.
  static void best_of_pass(const MatchProblem& a, const Image& image, const Match& p, int64_t from, float* memory,
                           Best* best) {
    float* inverse = memory + kPassSources * p.channels;
    for (int64_t m = 0; m < kPassSources; ++m) {
      inverse[m] = load_source<T>(a, image, p, from + m, memory + m * p.channels);
    }
    const int64_t number = std::min<int64_t>(kPassSources, p.sources - from);
    const auto scan = [&](auto scan_tile, int64_t panel) {
      for (int64_t m = 0; m < number; m += kTileSources) {
        scan_tile(p, memory + m * p.channels, inverse + m, panel * kLanes, best + m);
      }
    };
    int64_t panel = 0;
    for (; panel + kTilePanels <= p.panels; panel += kTilePanels) scan(scan_panels<kTilePanels>, panel);
    if (p.panels - panel == 2) scan(scan_panels<2>, panel);
    if (p.panels - panel == 1) scan(scan_panels<1>, panel);
  }
};

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
