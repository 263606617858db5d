// SPDX-License-Identifier: MIT
// Loops over images, rows or tasks, by one thread or by all. A body may throw: the loop completes, then throws.
#pragma once

#include <cstdint>

#include "failure.h"

namespace tokred::cpu {
namespace {

// Two loops, not one with an `if` clause: OpenMP makes a team of one thread for that, which shows in small calls.
template <class Body>
inline void for_each(int64_t number, bool parallel, Body body) {
  if (!parallel) {
    for (int64_t i = 0; i < number; ++i) body(i);
    return;
  }
  Failure failure;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < number; ++i) failure.guard([&] { body(i); });
  failure.rethrow();
}

// For bodies that take unequal time: each thread takes the next index when it is idle.
template <class Body>
inline void for_each_dynamic(int64_t number, const Body& body) {
  Failure failure;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t i = 0; i < number; ++i) failure.guard([&] { body(i); });
  failure.rethrow();
}

}  // namespace
}  // namespace tokred::cpu
