// SPDX-License-Identifier: MIT
// Bipartite matching. Images of ViT size take one launch, an image a block, from metric to finished map. Larger ones
// take three: the best destination of each source, the sources' ranks, the map.
#include "../common/match_config.h"
#include "launch.h"
#include "map_build.cuh"
#include "match_tile.cuh"
#include "ops.h"
#include "rank.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "bipartite_match";

// Lanes that share the counting for one source, so that ViT-sized images keep all warps busy.
constexpr int kLanesPerRank = 4;

template <class T>
__device__ __forceinline__ ImageMetric<T> image_metric(const MatchArgs& args, bool aligned, int64_t image) {
  return {static_cast<const T*>(args.metric) + image * args.stride_b,
          args.stride_h,
          args.stride_n,
          static_cast<int>(args.heads),
          static_cast<int>(args.channels),
          aligned};
}

__device__ __forceinline__ TileMemory tile_memory(const MatchConfig& c) {
  char* shared = dynamic_shared();
  return {shared, reinterpret_cast<float*>(shared + c.norms_offset),
          reinterpret_cast<uint64_t*>(shared + c.partial_offset)};
}

__device__ __forceinline__ void rank_in_block(const Partition& p, const uint32_t* keys, int32_t* rank) {
  for (int start = 0; start < p.num_src; start += kMatchThreads / kLanesPerRank) {
    const int i = start + static_cast<int>(threadIdx.x) / kLanesPerRank, part = threadIdx.x % kLanesPerRank;
    const uint32_t own = keys[min(i, p.num_src - 1)];
    int32_t before = count_before(keys, 0, padded_keys(p.num_src), part, kLanesPerRank, own, i);
#pragma unroll
    for (int step = 1; step < kLanesPerRank; step *= 2) before += __shfl_xor_sync(kFullWarp, before, step);
    if (part == 0 && i < p.num_src) rank[i] = i < p.protected_src ? kNoRank : before;
  }
}

template <class T, bool kResident>
__global__ void __launch_bounds__(kMatchThreads, 1)
    fused_match(const __grid_constant__ MatchArgs args, const __grid_constant__ MatchConfig c, bool aligned) {
  const Partition& p = args.partition;
  const int64_t image = blockIdx.x;
  const int tokens = static_cast<int>(args.tokens), num_out = num_slots(p);
  const ImageMetric<T> metric = image_metric<T>(args, aligned, image);
  const TileMemory memory = tile_memory(c);
  uint32_t* keys = reinterpret_cast<uint32_t*>(memory.operands + c.best_offset);
  int32_t* best = reinterpret_cast<int32_t*>(keys + padded_keys(p.num_src));

  for (int i = p.num_src + threadIdx.x; i < padded_keys(p.num_src); i += kMatchThreads) keys[i] = kAbsentKey;
  auto keep = [&](int source, uint64_t candidate) {
    keys[source] = source < p.protected_src ? kAbsentKey : candidate_key(candidate);
    best[source] = candidate_index(candidate);
  };
  if constexpr (kResident) load_resident(metric, p, image, c, memory);
  for (int source0 = 0; source0 < p.num_src; source0 += kTileSources) {
    match_sources<T, kResident>(metric, p, image, c, memory, source0, 0, p.num_dst, keep);
  }

  int32_t* rank = reinterpret_cast<int32_t*>(memory.operands);
  int32_t* dest = rank + p.num_src;
  int32_t* cursor = dest + tokens;
  rank_in_block(p, keys, rank);
  __syncthreads();
  write_dest<kMatchThreads>(p, image, tokens, rank, best, dest);
  const int64_t row0 = image * tokens, slot0 = image * num_out;
  for (int t = threadIdx.x; t < tokens; t += kMatchThreads) args.dest[row0 + t] = dest[t];
  invert_image<kMatchThreads>(dest, tokens, num_out, static_cast<int32_t>(row0), cursor, args.members + row0,
                              args.begin + slot0, args.count + slot0);
}

template <class T>
__global__ void __launch_bounds__(kMatchThreads, 1)
    tiled_match(const __grid_constant__ MatchArgs args, const __grid_constant__ MatchConfig c, bool aligned) {
  const Partition& p = args.partition;
  const int64_t tile = blockIdx.x % c.tiles, cut = blockIdx.x / c.tiles;  // cut = image * splits + split
  const int64_t image = cut / c.splits, split = cut % c.splits;
  const int length = static_cast<int>(divide_up(divide_up(p.num_dst, c.splits), kTileDestinations)) * kTileDestinations;
  const int begin = min(static_cast<int>(split) * length, p.num_dst), end = min(begin + length, p.num_dst);
  uint64_t* candidates = workspace_at(args.workspace, c, args.images, p.num_src).candidates + cut * p.num_src;
  match_sources<T, false>(image_metric<T>(args, aligned, image), p, image, c, tile_memory(c),
                          static_cast<int>(tile) * kTileSources, begin, end,
                          [&](int source, uint64_t candidate) { candidates[source] = candidate; });
}

// A block ranks 256 sources of an image against all of them, 256 at a time.
__global__ void __launch_bounds__(kRankThreads)
    rank_sources(const __grid_constant__ MatchArgs args, const __grid_constant__ MatchConfig c) {
  __shared__ uint4 key_storage[kRankThreads / 4];
  uint32_t* keys = reinterpret_cast<uint32_t*>(key_storage);
  const Partition& p = args.partition;
  const MatchWorkspace w = workspace_at(args.workspace, c, args.images, p.num_src);
  const int blocks = static_cast<int>(divide_up(p.num_src, kRankThreads));
  const int64_t image = blockIdx.x / blocks;
  const int i = blockIdx.x % blocks * kRankThreads + static_cast<int>(threadIdx.x);
  const uint64_t* candidates = w.candidates + image * c.splits * p.num_src;
  auto candidate_of = [&](int source) {
    uint64_t best = 0;
    for (int split = 0; split < c.splits; ++split) {
      const uint64_t other = candidates[static_cast<int64_t>(split) * p.num_src + source];
      best = other > best ? other : best;
    }
    return best;
  };

  const uint64_t own = i < p.num_src ? candidate_of(i) : 0;
  int32_t before = 0;
  for (int first = 0; first < p.num_src; first += kRankThreads) {
    const int source = first + static_cast<int>(threadIdx.x);
    const bool takes_part = source >= p.protected_src && source < p.num_src;
    keys[threadIdx.x] = takes_part ? candidate_key(candidate_of(source)) : kAbsentKey;
    __syncthreads();
    before += count_before(keys, first, kRankThreads, 0, 1, candidate_key(own), i);
    __syncthreads();
  }
  if (i < p.num_src) {
    w.rank[image * p.num_src + i] = i < p.protected_src ? kNoRank : before;
    w.best[image * p.num_src + i] = candidate_index(own);
  }
}

__global__ void __launch_bounds__(kMatchThreads)
    build_map(const __grid_constant__ MatchArgs args, const __grid_constant__ MatchConfig c, bool cursor_in_shared) {
  const Partition& p = args.partition;
  const int64_t image = blockIdx.x;
  const int tokens = static_cast<int>(args.tokens), num_out = num_slots(p);
  const MatchWorkspace w = workspace_at(args.workspace, c, args.images, p.num_src);
  const int64_t row0 = image * tokens, slot0 = image * num_out, source0 = image * p.num_src;
  int32_t* begin = args.begin + slot0;
  int32_t* cursor = cursor_in_shared ? reinterpret_cast<int32_t*>(dynamic_shared()) : begin;
  write_dest<kMatchThreads>(p, image, tokens, w.rank + source0, w.best + source0, args.dest + row0);
  invert_image<kMatchThreads>(args.dest + row0, tokens, num_out, static_cast<int32_t>(row0), cursor,
                              args.members + row0, begin, args.count + slot0);
}

bool rows_aligned(const MatchArgs& args) {
  const int64_t strides = args.stride_b | args.stride_n | (args.heads > 1 ? args.stride_h : 0);
  const uintptr_t bytes =
      reinterpret_cast<uintptr_t>(args.metric) | static_cast<uintptr_t>(strides * element_bytes(args.dtype));
  return bytes % kUnitBytes == 0;
}

}  // namespace

std::size_t match_workspace_bytes(const MatchArgs& args) {
  return workspace_bytes(match_config(args, shared_limit(kName)), args.images, args.partition.num_src);
}

void bipartite_match(const MatchArgs& args, cudaStream_t stream) {
  with_type<false>(kName, args.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (args.images == 0 || args.tokens == 0) return;
    const MatchConfig c = match_config(args, shared_limit(kName));
    const bool aligned = rows_aligned(args);
    if (c.fused) {
      auto* kernel = c.resident ? fused_match<T, true> : fused_match<T, false>;
      launch(kName, kernel, args.images, kMatchThreads, c.shared_bytes, stream, args, c, aligned);
      return;
    }
    const int64_t num_src = args.partition.num_src;
    if (num_src > 0) {
      launch(kName, tiled_match<T>, c.tiles * c.splits * args.images, kMatchThreads, c.shared_bytes, stream, args, c,
             aligned);
      launch(kName, rank_sources, divide_up(num_src, kRankThreads) * args.images, kRankThreads, 0, stream, args, c);
    }
    const int64_t cursor_bytes = int64_t{sizeof(int32_t)} * num_slots(args.partition);
    const bool cursor_in_shared = cursor_bytes <= kSharedWithoutAsking - kReservedShared;
    launch(kName, build_map, args.images, kMatchThreads, cursor_in_shared ? static_cast<int>(cursor_bytes) : 0, stream,
           args, c, cursor_in_shared);
  });
}

}  // namespace tokred::cuda
