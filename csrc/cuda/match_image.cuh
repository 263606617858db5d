// SPDX-License-Identifier: MIT
// One block matches one image, in one launch, and hands scores, partners and ranks to whatever the op makes of them.
#pragma once

#include "launch.h"
#include "match_tile.cuh"
#include "rank.cuh"

namespace tokred::cuda {

// Lanes that share the counting for one source, so that ViT-sized images keep all warps busy.
constexpr int kLanesPerRank = 4;

// The partition of one image. MatchArgs are never packed, so theirs stays in constant memory, and out of the registers.
__device__ __forceinline__ const Partition& image_partition(const MatchArgs& args, int64_t) { return args.partition; }

__device__ __forceinline__ Partition image_partition(const BestMatchArgs& args, int64_t image) {
  return args.starts ? of_tokens(args.partition, args.starts[image + 1] - args.starts[image]) : args.partition;
}

template <class T>
__device__ __forceinline__ ImageMetric<T> image_metric(const MatchProblem& args, bool aligned, int64_t image) {
  const int64_t offset = args.starts ? args.starts[image] * args.stride_n : image * args.stride_b;
  return {static_cast<const T*>(args.metric) + offset,
          args.stride_h,
          args.stride_n,
          static_cast<int>(args.heads),
          static_cast<int>(args.channels),
          aligned};
}

__device__ __forceinline__ TileMemory tile_memory(const MatchConfig& c) {
  char* shared = dynamic_shared();
  return {shared, shared + c.stages_offset, reinterpret_cast<float*>(shared + c.norms_offset),
          reinterpret_cast<uint64_t*>(shared + c.partial_offset)};
}

// The rank of each source of an image, from its keys in shared memory. `rank` may be in shared or in global memory.
__device__ __forceinline__ void rank_in_block(const Partition& p, const uint32_t* keys, int32_t* rank) {
  for (int start = 0; start < p.num_src; start += kMatchThreads / kLanesPerRank) {
    const int i = start + static_cast<int>(threadIdx.x) / kLanesPerRank, part = threadIdx.x % kLanesPerRank;
    const uint32_t own = keys[min(i, p.num_src - 1)];
    const int32_t before =
        sum_of_lanes<kLanesPerRank>(count_before(keys, 0, padded_keys(p.num_src), part, kLanesPerRank, own, i));
    if (part == 0 && i < p.num_src) rank[i] = i < p.protected_src ? kNoRank : before;
  }
}

// What is known of an image once its sources are matched. The operands' place is free from here on.
struct Matched {
  char* operands;
  const uint32_t* keys;  // (num_src), kAbsentKey of a protected source
  const int32_t* best;   // (num_src), the number of the best destination
};

// Finish::Args is what the op takes, and Finish::run(args, partition, image, matched) writes its results.
template <class T, Resident kResident, class Finish>
__global__ void __launch_bounds__(kMatchThreads, 1) fused_match(const __grid_constant__ typename Finish::Args args,
                                                                const __grid_constant__ MatchConfig c, bool aligned) {
  const int64_t image = blockIdx.x;
  const auto& p = image_partition(args, image);
  const ImageMetric<T> metric = image_metric<T>(args, aligned, image);
  const TileMemory memory = tile_memory(c);
  uint32_t* keys = reinterpret_cast<uint32_t*>(memory.operands + c.best_offset);
  int32_t* best = reinterpret_cast<int32_t*>(keys + padded_keys(p.num_src));

  for (int i = p.num_src + threadIdx.x; i < padded_keys(p.num_src); i += kMatchThreads) keys[i] = kAbsentKey;
  auto keep = [&](int source, uint64_t candidate) {
    keys[source] = source < p.protected_src ? kAbsentKey : candidate_key(candidate);
    best[source] = candidate_index(candidate);
  };
  if constexpr (kResident == Resident::all) {
    auto token_of = [&](int row) {
      return row < p.num_src ? source_token(p, image, row) : destination_token(p, image, row - p.num_src);
    };
    load_resident<kMatchThreads>(metric, p.num_src + p.num_dst, token_of, c, memory);
  }
  for (int source0 = 0; source0 < p.num_src; source0 += kTileSources) {
    match_sources<T, kResident, kMatchThreads>(metric, p, image, c, memory, source0, 0, p.num_dst, keep);
  }
  Finish::run(args, p, image, Matched{memory.operands, keys, best});
}

// True if every row starts at a multiple of 16 bytes.
inline bool rows_aligned(const MatchProblem& args) {
  const int64_t strides = args.stride_b | args.stride_n | (args.heads > 1 ? args.stride_h : 0);
  const uintptr_t bytes =
      reinterpret_cast<uintptr_t>(args.metric) | static_cast<uintptr_t>(strides * element_bytes(args.dtype));
  return bytes % kUnitBytes == 0;
}

template <class T, class Finish>
void launch_fused_match(const char* op, const typename Finish::Args& args, const MatchConfig& c, cudaStream_t stream) {
  auto* kernel =
      c.resident == Resident::all ? fused_match<T, Resident::all, Finish> : fused_match<T, Resident::none, Finish>;
  launch(op, kernel, args.images, kMatchThreads, c.shared_bytes, stream, args, c, rows_aligned(args));
}

}  // namespace tokred::cuda
