// SPDX-License-Identifier: MIT
// The best destination of each source, and the sources' order. Images of ViT size take one launch, an image a block;
// larger ones take two, tiles of scores over all multiprocessors and then the ranks.
#include "match_image.cuh"
#include "ops.h"
#include "rank_bins.cuh"
#include "stages.h"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "rank_candidates";

struct FinishBest {
  using Args = BestMatchArgs;

  static __device__ __forceinline__ void run(const BestMatchArgs& args, const Partition& p, int64_t image,
                                             const Matched& matched) {
    const int64_t from = image * args.partition.num_src;
    rank_in_block(p, matched.keys, args.rank + from);
    for (int32_t i = threadIdx.x; i < args.partition.num_src; i += kMatchThreads) {
      const bool present = i < p.num_src;
      args.score[from + i] = present && i >= p.protected_src ? key_score(matched.keys[i]) : -INFINITY;
      args.partner[from + i] = present ? matched.best[i] : 0;
      if (!present) args.rank[from + i] = kNoRank;
    }
  }
};

// Half as many threads as for small images, so that each has the registers for twice the accumulators: here the tiles
// are what takes time, and the fewer warps read the same rows the better.
constexpr int kTiledThreads = 256;

template <class T, Resident kResident>
__global__ void __launch_bounds__(kTiledThreads, 1)
    tiled_match(const __grid_constant__ BestMatchArgs args, const __grid_constant__ MatchConfig c, bool aligned) {
  const int64_t tile = blockIdx.x % c.tiles, cut = blockIdx.x / c.tiles;  // cut = image * splits + split
  const int64_t image = cut / c.splits, split = cut % c.splits;
  const Partition p = image_partition(args, image);
  const int source0 = static_cast<int>(tile) * kTileSources;
  if (source0 >= p.num_src) return;  // of an image shorter than the longest
  const int length = static_cast<int>(divide_up(divide_up(p.num_dst, c.splits), kTileDestinations)) * kTileDestinations;
  const int begin = min(static_cast<int>(split) * length, p.num_dst), end = min(begin + length, p.num_dst);
  uint64_t* candidates = static_cast<uint64_t*>(args.workspace) + cut * args.partition.num_src;
  match_sources<T, kResident, kTiledThreads>(image_metric<T>(args, aligned, image), p, image, c, tile_memory(c),
                                             source0, begin, end,
                                             [&](int source, uint64_t candidate) { candidates[source] = candidate; });
}

// What the cuts of a tiled match have found for an image.
struct Candidates {
  const uint64_t* of_cuts;  // (splits, all)
  int64_t all, splits;

  // The best destinations of sources first, first + kStep and so on, 0 past the last. Their loads wait together.
  template <int kStep, int kCount>
  __device__ __forceinline__ void best(const Partition& p, int first, uint64_t (&best)[kCount]) const {
#pragma unroll
    for (int k = 0; k < kCount; ++k) best[k] = 0;
    for (int64_t split = 0; split < splits; ++split) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        const int source = first + k * kStep;
        const uint64_t other = source < p.num_src ? of_cuts[split * all + source] : 0;
        best[k] = other > best[k] ? other : best[k];
      }
    }
  }

  __device__ __forceinline__ uint64_t best(const Partition& p, int source) const {
    uint64_t only[1];
    best<1>(p, source, only);
    return only[0];
  }

  // The keys of the sources; kAbsentKey for those that are protected or past the last.
  template <int kStep, int kCount>
  __device__ __forceinline__ void keys(const Partition& p, int first, uint32_t (&keys)[kCount]) const {
    uint64_t found[kCount];
    best<kStep>(p, first, found);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      keys[k] = first + k * kStep >= p.protected_src ? candidate_key(found[k]) : kAbsentKey;
    }
  }
};

__device__ __forceinline__ Candidates candidates(const BestMatchArgs& args, const MatchConfig& c, int64_t image) {
  const int64_t all = args.partition.num_src;
  return {static_cast<const uint64_t*>(args.workspace) + image * all * c.splits, all, c.splits};
}

// Writes what is known of source i once `before` of those that take part come before it.
__device__ __forceinline__ void write_source(const BestMatchArgs& args, const Partition& p, int64_t from, int i,
                                             uint64_t best, int32_t before) {
  const bool takes_part = i >= p.protected_src && i < p.num_src;
  args.rank[from + i] = takes_part ? before : kNoRank;
  args.partner[from + i] = i < p.num_src ? candidate_index(best) : 0;
  if (args.score) args.score[from + i] = takes_part ? key_score(candidate_key(best)) : -INFINITY;
}

// A block ranks some sources of an image against all of them, whose keys it goes through a part at a time.
__global__ void __launch_bounds__(kRankThreads)
    rank_sources(const __grid_constant__ BestMatchArgs args, const __grid_constant__ MatchConfig c) {
  __shared__ uint4 key_storage[kRankKeys / 4];
  uint32_t* keys = reinterpret_cast<uint32_t*>(key_storage);
  const int64_t all = args.partition.num_src, blocks = divide_up(all, kRankSources), image = blockIdx.x / blocks;
  const Partition p = image_partition(args, image);
  const Candidates found = candidates(args, c, image);
  const int i = static_cast<int>(blockIdx.x % blocks) * kRankSources + static_cast<int>(threadIdx.x) / kRankLanes;
  const int part = threadIdx.x % kRankLanes;

  const uint64_t own = found.best(p, i);
  int32_t before = 0;
  for (int first = 0; first < p.num_src; first += kRankKeys) {
    uint32_t own_keys[kRankKeys / kRankThreads];
    found.keys<kRankThreads>(p, first + static_cast<int>(threadIdx.x), own_keys);
#pragma unroll
    for (int k = 0; k < kRankKeys / kRankThreads; ++k) keys[threadIdx.x + k * kRankThreads] = own_keys[k];
    __syncthreads();
    before += count_before(keys, first, kRankKeys, part, kRankLanes, candidate_key(own), i);
    __syncthreads();
  }
  before = sum_of_lanes<kRankLanes>(before);
  if (part == 0 && i < all) write_source(args, p, image * all, i, own, before);
}

// The same for so many sources that it is faster to fill bins, with a warp for each source, than to compare all pairs.
// At most one block a multiprocessor: with registers for two, the kernel spills.
__global__ void __launch_bounds__(kBinThreads, 1)
    rank_by_bins(const __grid_constant__ BestMatchArgs args, const __grid_constant__ MatchConfig c) {
  const int64_t all = args.partition.num_src, blocks = divide_up(all, kBinSources), image = blockIdx.x / blocks;
  const Partition p = image_partition(args, image);
  const Candidates found = candidates(args, c, image);
  const Bins bins = bins_at(dynamic_shared(), args.partition.num_src);
  fill_bins(bins, p.num_src,
            [&](int source, uint32_t (&keys)[kKeysAtOnce]) { found.keys<kBinThreads>(p, source, keys); });

  const int first = static_cast<int>(blockIdx.x % blocks) * kBinSources;
  const int end = min(first + kBinSources, args.partition.num_src);
  for (int i = first + static_cast<int>(threadIdx.x) / kLanes; i < end; i += kBinThreads / kLanes) {
    const bool takes_part = i >= p.protected_src && i < p.num_src;
    const int32_t before = takes_part ? rank_in_bins(bins, i) : kNoRank;
    if (threadIdx.x % kLanes == 0) write_source(args, p, image * all, i, found.best(p, i), before);
  }
}

// Up to so many sources each is compared with all others.
constexpr int64_t kMostCompared = 2048;

}  // namespace

void tiled_rank_candidates(const char* op, const BestMatchArgs& args, const MatchConfig& c, cudaStream_t stream) {
  const int64_t num_src = args.partition.num_src;
  if (num_src == 0) return;
  with_type<false>(op, args.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* kernel = c.resident == Resident::sources ? tiled_match<T, Resident::sources> : tiled_match<T, Resident::none>;
    launch(op, kernel, c.tiles * c.splits * args.images, kTiledThreads, c.shared_bytes, stream, args, c,
           rows_aligned(args));
  });
  const int64_t bytes = bins_bytes(num_src);
  if (num_src > kMostCompared && bytes <= shared_limit(op)) {
    const int64_t blocks = divide_up(num_src, kBinSources) * args.images;
    return launch(op, rank_by_bins, blocks, kBinThreads, static_cast<int>(bytes), stream, args, c);
  }
  launch(op, rank_sources, divide_up(num_src, kRankSources) * args.images, kRankThreads, 0, stream, args, c);
}

std::size_t rank_candidates_workspace_bytes(const BestMatchArgs& args) {
  return candidate_bytes(match_config(args, shared_limit(kName)), args.images, args.partition.num_src);
}

void rank_candidates(const BestMatchArgs& args, cudaStream_t stream) {
  with_type<false>(kName, args.dtype, [&](auto zero) {
    if (args.images == 0 || args.partition.num_src == 0) return;
    const MatchConfig c = match_config(args, shared_limit(kName));
    if (!c.fused) return tiled_rank_candidates(kName, args, c, stream);
    launch_fused_match<decltype(zero), FinishBest>(kName, args, c, stream);
  });
}

}  // namespace tokred::cuda
