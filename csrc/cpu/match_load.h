// SPDX-License-Identifier: MIT
// What a match reads: one image's destinations in panels for the tiles, and its sources, a pass at a time.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/slots.h"
#include "element.h"
#include "norm.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// A register tile: kTileSources rows times kTilePanels vectors of destinations. With AVX-512 24 of 32 registers hold
// scores, with 16 registers 12 do; the rest are the loaded destinations and one broadcast source.
constexpr int kTileSources = kLanes == 16 ? 8 : 4;
constexpr int kTilePanels = 3;
// Sources, in tiles, that share the panels they fetch: measured, 32 beat 8 and 16, and 64 was no better.
constexpr int kPassSources = 32;
constexpr int kPassTiles = kPassSources / kTileSources;

// One image of a MatchProblem: where it lies, and its own partition.
struct Image {
  int64_t number;
  int64_t offset;  // elements of the metric before its first token
  Partition partition;
};

Image image_of(const MatchProblem& a, int64_t number) {
  if (!a.starts) return {number, number * a.stride_b, a.partition};
  const int64_t tokens = a.starts[number + 1] - a.starts[number];
  return {number, a.starts[number] * a.stride_n, of_tokens(a.partition, tokens)};
}

// One image's destinations, ready for the tiles, and what these find: all in one thread's scratch memory.
struct Match {
  int64_t channels, sources, destinations;  // destinations: those that may be joined
  int64_t panels;                           // of kLanes destinations
  float* destination;                       // (panel, D, lane)
  float* inverse_dst;                       // (panel, lane): NaN where there is none, so that it never wins
  float* score;                             // (sources): the highest
  int32_t* partner;                         // (sources): the number of the destination that has it
  int32_t* rank;                            // (sources): room for their ranks
  uint64_t* keys;                           // (2, sources): room for what is sorted to find these
};

// Token n's metric as floats; the mean over heads is rounded to the metric's own dtype.
template <class T>
void load_token(const MatchProblem& a, const Image& image, int64_t token, float* out) {
  using E = Element<T>;
  const T* metric = static_cast<const T*>(a.metric) + image.offset + token * a.stride_n;
#pragma omp simd
  for (int64_t d = 0; d < a.channels; ++d) out[d] = static_cast<float>(E::load(metric[d]));
  if (a.heads == 1) return;
  for (int64_t h = 1; h < a.heads; ++h) {
    const T* head = metric + h * a.stride_h;
#pragma omp simd
    for (int64_t d = 0; d < a.channels; ++d) out[d] += static_cast<float>(E::load(head[d]));
  }
  const float heads = static_cast<float>(a.heads);
#pragma omp simd
  for (int64_t d = 0; d < a.channels; ++d) out[d] = static_cast<float>(E::load(E::store(out[d] / heads)));
}

template <class T>
void load_panel(const MatchProblem& a, const Image& image, const Match& p, int64_t panel, float* row) {
  float* out = p.destination + panel * p.channels * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t j = panel * kLanes + lane;
    if (j < p.destinations) {
      const int32_t number = static_cast<int32_t>(j) + image.partition.protected_dst;
      load_token<T>(a, image, destination_token(image.partition, image.number, number), row);
      p.inverse_dst[j] = inverse_norm(squared_norm(row, p.channels));
      for (int64_t d = 0; d < p.channels; ++d) out[d * kLanes + lane] = row[d];
    } else {
      p.inverse_dst[j] = std::numeric_limits<float>::quiet_NaN();
      for (int64_t d = 0; d < p.channels; ++d) out[d * kLanes + lane] = 0;
    }
  }
}

// The sources of a pass.
struct Pass {
  float* source;   // (kPassSources, D)
  float* inverse;  // (kPassSources)
};

// Loads the sources from `from` on; where there are too few, the rest are zero.
template <class T>
void load_pass(const MatchProblem& a, const Image& image, const Match& p, int64_t from, const Pass& pass) {
  const int64_t number = std::min<int64_t>(kPassSources, p.sources - from);
  for (int64_t m = 0; m < number; ++m) {
    float* row = pass.source + m * p.channels;
    load_token<T>(a, image, source_token(image.partition, image.number, static_cast<int32_t>(from + m)), row);
    pass.inverse[m] = inverse_norm(squared_norm(row, p.channels));
  }
  std::fill(pass.source + number * p.channels, pass.source + kPassSources * p.channels, 0.0f);
  std::fill(pass.inverse + number, pass.inverse + kPassSources, 0.0f);
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
