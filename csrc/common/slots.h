// SPDX-License-Identifier: MIT
// Where a source goes once its rank is known (see Partition in args.h).
#pragma once

#include "partition.h"

namespace tokred {

// The rank of a protected source: it is never among the first r.
constexpr int32_t kNoRank = INT32_MAX;

TOKRED_HD bool joins(const Partition& p, int32_t rank) { return rank < p.r; }

// The slot of source i, whose similarity has this rank (0 is best) among the sources that may join. `joined_before`
// is how many sources of lower number join, and `best` the destination it likes most.
TOKRED_HD int32_t source_slot(const Partition& p, int32_t i, int32_t rank, int32_t joined_before, int32_t best) {
  if (joins(p, rank)) return destination_slot(p, best);
  const bool by_index = p.sources_by_index || i < p.protected_src;
  return unmerged_slot(p, by_index ? i - joined_before : p.protected_src + rank - p.r);
}

// The partition of an image of so many tokens where images of several lengths are packed: even and odd tokens.
TOKRED_HD Partition of_tokens(const Partition& p, int64_t tokens) {
  Partition own = p;
  own.num_src = static_cast<int32_t>((tokens + 1) / 2);
  own.num_dst = static_cast<int32_t>(tokens / 2);
  return own;
}

// How many of an image's tokens have a slot; the others are dropped.
TOKRED_HD int32_t kept_tokens(const Partition& p) { return p.first + p.num_src + p.num_dst; }

}  // namespace tokred
