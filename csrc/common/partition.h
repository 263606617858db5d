// SPDX-License-Identifier: MIT
// The arithmetic of a Partition (see args.h), shared by the CPU and the CUDA match.
#pragma once

#include "args.h"
#include "numerics.h"

namespace tokred {

TOKRED_HD int32_t source_token(const Partition& p, int64_t image, int32_t i) {
  if (p.sources) return p.sources[image * p.num_src + i];
  return p.first + (p.stride == 1 ? p.num_dst + i : i + i / (p.stride - 1));
}

TOKRED_HD int32_t destination_token(const Partition& p, int64_t image, int32_t j) {
  if (p.destinations) return p.destinations[image * p.num_dst + j];
  return p.first + j * p.stride + p.stride - 1;
}

TOKRED_HD int32_t num_slots(const Partition& p) { return p.first + (p.num_src - p.r) + p.num_dst; }

// How many protected destinations follow an unmerged source: all, where so many sources are left.
TOKRED_HD int32_t interleaved(const Partition& p) {
  return p.protected_dst < p.num_src - p.r ? p.protected_dst : p.num_src - p.r;
}

// The slot of the u-th source that did not join.
TOKRED_HD int32_t unmerged_slot(const Partition& p, int32_t u) {
  return p.first + (u < interleaved(p) ? 2 * u : u + interleaved(p));
}

// The slot of destination j.
TOKRED_HD int32_t destination_slot(const Partition& p, int32_t j) {
  return p.first + (j < interleaved(p) ? 2 * j + 1 : (p.num_src - p.r) + j);
}

}  // namespace tokred
