// SPDX-License-Identifier: MIT
// Keeping the highest scores, a block an image. Every slot has one member but the fused one, so both views have closed
// forms once the order is known: no members are counted.
#include <cmath>

#include "../common/order.h"
#include "block_scan.cuh"
#include "block_sort.cuh"
#include "launch.h"
#include "ops.h"
#include "ptx.cuh"
#include "rank.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "keep_topk";

// An image has one block, so as many warps as there can be.
constexpr int kKeepThreads = 1024;
// Up to so many candidates each counts those before it; above, comparing all pairs takes longer than a sort.
constexpr int kMostCounted = 512;
// Lanes that share a candidate's count, so that a small ViT's candidates are all counted at once.
constexpr int kLanesPerRank = 4;
constexpr int kKeysPerLoad = 4;

enum class Order { counted, sorted, sorted_in_place };

// A packed candidate in two arrays of 32 bits: where an image has too many for shared memory they are sorted in the
// place of its outputs.
struct Halves {
  int32_t *high, *low;

  struct Value {
    int32_t *high, *low;
    __device__ __forceinline__ operator uint64_t() const {
      return static_cast<uint64_t>(static_cast<uint32_t>(*high)) << 32 | static_cast<uint32_t>(*low);
    }
    __device__ __forceinline__ void operator=(uint64_t value) const {
      *high = static_cast<int32_t>(value >> 32);
      *low = static_cast<int32_t>(value);
    }
  };
  __device__ __forceinline__ Value operator[](int32_t i) const { return {high + i, low + i}; }
};

__device__ __forceinline__ float comparable(float score) { return std::isnan(score) ? -INFINITY : score; }

// Puts candidates in order. Ends with a barrier.
template <class Values>
__device__ __forceinline__ void sort_scores(const float* score, int32_t number, Values order) {
  for (int32_t i = threadIdx.x; i < number; i += kKeepThreads) order[i] = pack_candidate(comparable(score[i]), i);
  sort_descending<kKeepThreads>(order, number);
}

template <Order kOrder>
__global__ void __launch_bounds__(kKeepThreads) keep_highest(const __grid_constant__ KeepTopkArgs args) {
  const int64_t image = blockIdx.x;
  const int32_t tokens = static_cast<int32_t>(args.tokens), first = args.first, k = args.k;
  const int32_t number = tokens - first, slots = first + k + args.fuse;
  const int32_t row0 = static_cast<int32_t>(image * tokens);
  const float* score = args.score + image * args.stride + first;
  int32_t* dest = args.dest + image * tokens;
  int32_t* members = args.members + image * tokens;
  // Those of the candidates: the prefix has its own above.
  int32_t *free_dest = dest + first, *free_members = members + first;

  uint32_t* keys = reinterpret_cast<uint32_t*>(dynamic_shared());
  uint64_t* order = reinterpret_cast<uint64_t*>(dynamic_shared());
  const Halves halves{free_dest, free_members};
  const int32_t padded = static_cast<int32_t>(round_up(number, kKeysPerLoad));
  if constexpr (kOrder == Order::counted) {
    for (int32_t i = threadIdx.x; i < padded; i += kKeepThreads) {
      keys[i] = i < number ? ordered_key(comparable(score[i])) : kAbsentKey;
    }
  } else if constexpr (kOrder == Order::sorted) {
    sort_scores(score, number, order);
  } else {
    sort_scores(score, number, halves);
  }

  for (int32_t t = threadIdx.x; t < first; t += kKeepThreads) dest[t] = t, members[t] = row0 + t;
  const int32_t others_slot = args.fuse ? first + k : -1;
  for (int32_t i = threadIdx.x; i < number; i += kKeepThreads) free_dest[i] = others_slot;
  __syncthreads();

  auto keep = [&](int32_t candidate, int32_t rank) {
    free_dest[candidate] = first + rank;
    free_members[rank] = row0 + first + candidate;
  };
  if constexpr (kOrder == Order::counted) {
    for (int32_t start = 0; start < number; start += kKeepThreads / kLanesPerRank) {
      const int32_t i = start + static_cast<int32_t>(threadIdx.x) / kLanesPerRank, part = threadIdx.x % kLanesPerRank;
      const uint32_t own = keys[min(i, number - 1)];
      const int32_t rank = sum_of_lanes<kLanesPerRank>(count_before(keys, 0, padded, part, kLanesPerRank, own, i));
      if (part == 0 && i < number && rank < k) keep(i, rank);
    }
  } else {
    for (int32_t rank = threadIdx.x; rank < k; rank += kKeepThreads) {
      keep(candidate_index(kOrder == Order::sorted ? order[rank] : static_cast<uint64_t>(halves[rank])), rank);
    }
  }
  __syncthreads();

  if (args.fuse) {
    int32_t before = 0;  // of the others, in the rounds before this one
    for (int32_t start = 0; start < number; start += kKeepThreads) {
      const int32_t i = start + static_cast<int32_t>(threadIdx.x);
      const bool other = i < number && free_dest[i] == others_slot;
      int32_t total;
      const int32_t place = before + exclusive_scan<kKeepThreads>(other, total);
      if (other) free_members[k + place] = row0 + first + i;
      before += total;
    }
  } else {
    for (int32_t i = k + threadIdx.x; i < number; i += kKeepThreads) free_members[i] = -1;
  }
  for (int32_t slot = threadIdx.x; slot < slots; slot += kKeepThreads) {
    args.begin[image * slots + slot] = row0 + slot;
    args.count[image * slots + slot] = slot < first + k ? 1 : number - k;
  }
}

}  // namespace

void keep_topk(const KeepTopkArgs& args, cudaStream_t stream) {
  if (args.images == 0 || args.tokens == 0) return;
  const int64_t number = args.tokens - args.first;
  const int64_t bytes = number * static_cast<int64_t>(sizeof(uint64_t));
  if (number <= kMostCounted) {
    const int64_t padded = static_cast<int64_t>(round_up(number, kKeysPerLoad) * sizeof(uint32_t));
    launch(kName, keep_highest<Order::counted>, args.images, kKeepThreads, static_cast<int>(padded), stream, args);
  } else if (bytes <= shared_limit(kName)) {
    launch(kName, keep_highest<Order::sorted>, args.images, kKeepThreads, static_cast<int>(bytes), stream, args);
  } else {
    launch(kName, keep_highest<Order::sorted_in_place>, args.images, kKeepThreads, 0, stream, args);
  }
}

}  // namespace tokred::cuda
