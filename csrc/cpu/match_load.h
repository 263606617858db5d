// SPDX-License-Identifier: MIT
// What a match reads and finds: one image's tokens, one at a time, and where its results go.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/slots.h"
#include "element.h"
#include "norm.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Sources that share the destinations they fetch: measured, 32 beat 8 and 16, and 64 was no better.
constexpr int kPassSources = 32;

// One image of a MatchProblem: its place in memory and its partition.
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
  float* destination;                       // (panel): each in the layout that the scores read
  float* inverse_dst;                       // (panel, lane): NaN for an absent destination, so that it never wins
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

// Loads destination j as floats and returns the inverse of its norm; zeros and NaN past the end, so it never wins.
template <class T>
float load_destination(const MatchProblem& a, const Image& image, const Match& p, int64_t j, float* row) {
  if (j >= p.destinations) {
    std::fill(row, row + p.channels, 0.0f);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const int32_t number = static_cast<int32_t>(j) + image.partition.protected_dst;
  load_token<T>(a, image, destination_token(image.partition, image.number, number), row);
  return inverse_norm(squared_norm(row, p.channels));
}

// Loads source i as floats and returns the inverse of its norm; zeros and 0 past the end.
template <class T>
float load_source(const MatchProblem& a, const Image& image, const Match& p, int64_t i, float* row) {
  if (i >= p.sources) {
    std::fill(row, row + p.channels, 0.0f);
    return 0;
  }
  load_token<T>(a, image, source_token(image.partition, image.number, static_cast<int32_t>(i)), row);
  return inverse_norm(squared_norm(row, p.channels));
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
