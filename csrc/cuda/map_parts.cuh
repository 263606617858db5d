// SPDX-License-Identifier: MIT
// Several blocks collect the members of one image's slots, each block for a part of the slots and on its own.
#pragma once

#include "../common/sizes.h"
#include "block_scan.cuh"

namespace tokred::cuda {

// Slots of a block. Every block goes through all of the image's tokens, so that no block waits for another.
constexpr int kPartSlots = 256;
constexpr int kPartThreads = 1024;
constexpr int kPartWarps = kPartThreads / kLanes;
static_assert(kPartSlots <= kPartThreads, "a slot is one thread's while its warps' counts are summed");
// Each warp counts for itself.
constexpr int kPartCursors = kPartWarps * kPartSlots;

// Blocks of an image of so many slots. One without slots has a block too: it writes what dropped tokens leave free.
__host__ __device__ __forceinline__ int32_t parts_of(int64_t slots) {
  return slots <= kPartSlots ? 1 : static_cast<int32_t>((slots + kPartSlots - 1) / kPartSlots);
}

// Members of slots [part * kPartSlots, + kPartSlots) of an image of num_out, ascending: a counting sort of its tokens
// by slot, stable, so that it has one result. `row0` is the image's first row, `slot0` what dest calls its first slot,
// `cursors` are kPartCursors numbers of shared memory. Each warp reads a range of the tokens: the order of the ranges,
// and of the lanes in a warp, keeps tokens ascending.
__device__ __forceinline__ void to_csr_part(const int32_t* dest, int32_t tokens, int32_t num_out, int32_t part,
                                            int32_t row0, int32_t slot0, int32_t* cursors, int32_t* members,
                                            int32_t* begin, int32_t* count) {
  constexpr int32_t kDropped = INT32_MAX;
  const int32_t thread = threadIdx.x, lane = thread % kLanes, warp = thread / kLanes;
  const int32_t first_slot = part * kPartSlots, slots = min(kPartSlots, num_out - first_slot);
  const int32_t range = static_cast<int32_t>(divide_up(tokens, kPartThreads)) * kLanes;
  const int32_t from = min(warp * range, tokens), to = min(from + range, tokens);
  int32_t* own = cursors + warp * kPartSlots;

  // Calls visit(token, slot) for the warp's tokens in order, all lanes together; the slot is counted from the part's
  // first one. The next slot is on its way meanwhile.
  auto walk = [&](auto visit) {
    auto slot_of = [&](int32_t t) {
      const int32_t slot = t < to ? dest[t] : -1;
      return slot < 0 ? kDropped : slot - slot0 - first_slot;
    };
    int32_t next = slot_of(from + lane);
#pragma unroll 1
    for (int32_t t = from + lane; t - lane < to; t += kLanes) {
      const int32_t slot = next;
      next = slot_of(t + kLanes);
      visit(t, slot);
    }
  };

// Not unrolled, here and below: with this many threads, each has only 64 registers.
#pragma unroll 1
  for (int32_t k = thread; k < kPartCursors; k += kPartThreads) cursors[k] = 0;
  __syncthreads();
  int32_t below = 0;  // tokens in the parts before this one
  walk([&](int32_t, int32_t slot) {
    below += slot < 0;
    if (slot >= 0 && slot < slots) atomicAdd(&own[slot], 1);  // whole numbers: any order gives the same counts
  });
  const int32_t placed = block_sum<kPartThreads>(below);  // its barriers make the counts known, too

  int32_t size = 0;
  if (thread < slots) {
#pragma unroll 8
    for (int w = 0; w < kPartWarps; ++w) size += cursors[w * kPartSlots + thread];
  }
  int32_t total;
  int32_t place = placed + exclusive_scan<kPartThreads>(size, total);
  if (thread < slots) {
    begin[first_slot + thread] = row0 + place;
    count[first_slot + thread] = size;
#pragma unroll 8
    for (int w = 0; w < kPartWarps; ++w) {
      const int32_t counted = cursors[w * kPartSlots + thread];
      cursors[w * kPartSlots + thread] = place;
      place += counted;
    }
  }
  if (first_slot + kPartSlots >= num_out) {
#pragma unroll 1
    for (int32_t m = placed + total + thread; m < tokens; m += kPartThreads) members[m] = -1;
  }
  __syncthreads();

  walk([&](int32_t t, int32_t slot) {
    const bool wanted = slot >= 0 && slot < slots;
    if (!__any_sync(kFullWarp, wanted)) return;
    const unsigned peers = __match_any_sync(kFullWarp, wanted ? slot : -1);
    const int before = __popc(peers & ((1u << lane) - 1));
    const int32_t free = wanted ? own[slot] : 0;
    __syncwarp();
    if (wanted) {
      if (before == 0) own[slot] = free + __popc(peers);
      members[free + before] = row0 + t;
    }
    __syncwarp();
  });
}

}  // namespace tokred::cuda
