// SPDX-License-Identifier: MIT
// The squared length of a row of floats.
#pragma once

#include <cstring>

#include "isa.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Sums side by side, so that one addition need not wait for the last.
constexpr int kPartialSums = 4;

// By halves, for the same reason.
template <int kNumber>
float sum_of_lanes(const float* lanes) {
  if constexpr (kNumber == 4) {
    return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  } else {
    using Half __attribute__((vector_size(kNumber / 2 * sizeof(float)))) = float;
    Half low, high;
    std::memcpy(&low, lanes, sizeof(low));
    std::memcpy(&high, lanes + kNumber / 2, sizeof(high));
    low += high;
    float half[kNumber / 2];
    std::memcpy(half, &low, sizeof(half));
    return sum_of_lanes<kNumber / 2>(half);
  }
}

// The order of the additions depends on `channels` alone, never on where the row lies.
float squared_norm(const float* vector, int64_t channels) {
  FloatVector sums[kPartialSums] = {};
  int64_t c = 0;
  for (; c + kPartialSums * kLanes <= channels; c += kPartialSums * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kPartialSums; ++k) {
      FloatVector values;
      std::memcpy(&values, vector + c + k * kLanes, sizeof(values));
      sums[k] += values * values;
    }
  }
  for (; c + kLanes <= channels; c += kLanes) {
    FloatVector values;
    std::memcpy(&values, vector + c, sizeof(values));
    sums[0] += values * values;
  }
  const FloatVector total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float lanes[kLanes];
  std::memcpy(lanes, &total, sizeof(lanes));
  float sum = sum_of_lanes<kLanes>(lanes);
  for (; c < channels; ++c) sum += vector[c] * vector[c];
  return sum;
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
