// SPDX-License-Identifier: MIT
// Scores as integers of the same order, so that selecting and ranking never depend on float comparisons.
#pragma once

#include <cstdint>
#include <cstring>

#include "numerics.h"

namespace tokred {

// Keys compare like the floats; the two zeros are equal. `value` must not be NaN, which never wins a comparison.
TOKRED_HD uint32_t ordered_key(float value) {
  const float canonical = value + 0.0f;  // -0 becomes 0
  uint32_t bits;
  memcpy(&bits, &canonical, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The number that has this key.
TOKRED_HD float key_score(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The key of an absent entry: below the key of every number, including -infinity.
constexpr uint32_t kAbsentKey = 0;

// A score and its index in one integer: the greater score wins, and of equal scores the lower index.
TOKRED_HD uint64_t pack_candidate(float score, int32_t index) {
  return static_cast<uint64_t>(ordered_key(score)) << 32 | ~static_cast<uint32_t>(index);
}

TOKRED_HD uint32_t candidate_key(uint64_t candidate) { return static_cast<uint32_t>(candidate >> 32); }

TOKRED_HD int32_t candidate_index(uint64_t candidate) {
  return static_cast<int32_t>(~static_cast<uint32_t>(candidate));
}

}  // namespace tokred
