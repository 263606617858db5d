// SPDX-License-Identifier: MIT
// The best destination of a source, a candidate a lane.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "isa.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

struct Best {
  FloatVector score = FloatVector{} - std::numeric_limits<float>::infinity();
  IndexVector number = IndexVector{};

  // Numbers only grow along a lane, so "greater" alone leaves the lower one at a tie; NaN is never greater.
  void meet(FloatVector scores, IndexVector numbers) {
    const IndexVector wins = scores > score;
    score = wins ? scores : score;
    number = wins ? numbers : number;
  }
};

// The numbers j, j + 1, ... of a vector of destinations.
inline IndexVector numbers_from(int64_t j) {
  IndexVector lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
  return lane + static_cast<int32_t>(j);
}

// The best of a source's lanes: the greatest, and of equals the one with the lowest number.
inline void best_of_lanes(const Best& lanes, float& best, int32_t& number) {
  float score[kLanes];
  int32_t index[kLanes];
  std::memcpy(score, &lanes.score, sizeof(score));
  std::memcpy(index, &lanes.number, sizeof(index));
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

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
