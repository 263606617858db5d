// SPDX-License-Identifier: MIT
// The slots of an image's tokens from ranks, and the members of each slot, for one block an image. See map_parts.cuh
// for several blocks an image.
#pragma once

#include "../common/slots.h"
#include "block_scan.cuh"

namespace tokred::cuda {

// Sources whose slots a thread finds at a time, if none depends on an earlier source.
constexpr int kSourcesAtOnce = 4;

// Writes dest[0, tokens) of an image from the rank and the best destination of each source. `slot0` is what the image's
// first slot is called. The pointers may be to shared or to global memory; no token is given two values, so that
// several blocks may write the same. Ends with a barrier.
template <int kThreads>
__device__ __forceinline__ void write_dest(const Partition& p, int64_t image, int32_t tokens, const int32_t* rank,
                                           const int32_t* best, int32_t slot0, int32_t* dest) {
  const int32_t thread = threadIdx.x;
  if (p.r == 0) {
    for (int32_t t = thread; t < tokens; t += kThreads) dest[t] = t < kept_tokens(p) ? slot0 + t : -1;
    __syncthreads();
    return;
  }
  for (int32_t t = kept_tokens(p) + thread; t < tokens; t += kThreads) dest[t] = -1;  // the last ones are dropped
  for (int32_t t = thread; t < p.first; t += kThreads) dest[t] = slot0 + t;
  for (int32_t j = thread; j < p.num_dst; j += kThreads) {
    dest[destination_token(p, image, j)] = slot0 + destination_slot(p, j);
  }
  if (p.sources_by_index) {
    int32_t joined = 0;  // sources of the rounds before this one that join
    for (int32_t start = 0; start < p.num_src; start += kThreads) {
      const int32_t i = start + thread;
      const bool present = i < p.num_src;
      const int32_t own_rank = present ? rank[i] : kNoRank, own_best = present ? best[i] : 0;
      int32_t total;
      const int32_t before = joined + exclusive_scan<kThreads>(joins(p, own_rank), total);
      if (present) dest[source_token(p, image, i)] = slot0 + source_slot(p, i, own_rank, before, own_best);
      joined += total;
    }
  } else {
    for (int32_t start = thread; start < p.num_src; start += kSourcesAtOnce * kThreads) {
      int32_t token[kSourcesAtOnce], slot[kSourcesAtOnce];
#pragma unroll
      for (int k = 0; k < kSourcesAtOnce; ++k) {
        const int32_t i = min(start + k * kThreads, p.num_src - 1);  // past the end, the last source again
        token[k] = source_token(p, image, i);
        slot[k] = source_slot(p, i, rank[i], 0, best[i]);
      }
#pragma unroll
      for (int k = 0; k < kSourcesAtOnce; ++k) dest[token[k]] = slot0 + slot[k];
    }
  }
  __syncthreads();
}

// Members of each slot, ascending: a counting sort of the tokens of one image by slot, stable, so that it has one
// result. `row0` is the image's first row, `slot0` what dest calls its first slot. `cursor` has num_out entries in
// shared memory; it counts, then points at where the slot's next member goes.
template <int kThreads>
__device__ __forceinline__ void to_csr_image(const int32_t* dest, int32_t tokens, int32_t num_out, int32_t row0,
                                             int32_t slot0, int32_t* cursor, int32_t* members, int32_t* begin,
                                             int32_t* count) {
  const int32_t thread = threadIdx.x;
  for (int32_t s = thread; s < num_out; s += kThreads) cursor[s] = 0;
  __syncthreads();
  for (int32_t t = thread; t < tokens; t += kThreads) {
    if (dest[t] >= 0) atomicAdd(&cursor[dest[t] - slot0], 1);  // whole numbers: any order gives the same counts
  }
  __syncthreads();

  int32_t placed = 0;
  for (int32_t start = 0; start < num_out; start += kThreads) {
    const int32_t s = start + thread;
    const int32_t size = s < num_out ? cursor[s] : 0;
    int32_t total;
    const int32_t before = placed + exclusive_scan<kThreads>(size, total);
    if (s < num_out) {
      count[s] = size;
      cursor[s] = before;
    }
    placed += total;
  }
  for (int32_t m = placed + thread; m < tokens; m += kThreads) members[m] = -1;
  __syncthreads();

  // Inside a warp the lanes of one slot find their order at once; the warps take turns, which keeps tokens ascending.
  const int lane = thread % kLanes, warp = thread / kLanes;
  for (int32_t start = 0; start < tokens; start += kThreads) {
    const int32_t t = start + thread;
    const int32_t slot = t < tokens && dest[t] >= 0 ? dest[t] - slot0 : -1;
    const unsigned peers = __match_any_sync(kFullWarp, slot);
    const int before = __popc(peers & ((1u << lane) - 1));
    const int turns = (min(kThreads, tokens - start) + kLanes - 1) / kLanes;
    for (int turn = 0; turn < turns; ++turn) {
      if (turn == warp) {
        const int32_t place = slot >= 0 ? cursor[slot] : 0;
        __syncwarp();
        if (slot >= 0) {
          if (before == 0) cursor[slot] = place + __popc(peers);
          members[place + before] = row0 + t;
        }
      }
      __syncthreads();
    }
  }
  for (int32_t s = thread; s < num_out; s += kThreads) begin[s] = row0 + cursor[s] - count[s];
}

}  // namespace tokred::cuda
