// SPDX-License-Identifier: MIT
// A loop over images or rows, by one thread or by all.
#pragma once

#include <cstdint>

namespace tokred::cpu {
namespace {

// Two loops, not one with an `if` clause: OpenMP makes a team of one thread for that, which shows in small calls.
template <class Body>
inline void for_each(int64_t number, bool parallel, Body body) {
  if (parallel) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < number; ++i) body(i);
  } else {
    for (int64_t i = 0; i < number; ++i) body(i);
  }
}

}  // namespace
}  // namespace tokred::cpu
