// SPDX-License-Identifier: MIT
// The best destination of each source, and the sources' order. Images of ViT size take one launch, an image a block;
// larger ones take two, tiles of scores over all multiprocessors and then the ranks.
#include "match_image.cuh"
#include "ops.h"
#include "stages.h"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "best_match";

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

// A block ranks some sources of an image against all of them, whose keys it goes through a part at a time.
__global__ void __launch_bounds__(kRankThreads)
    rank_sources(const __grid_constant__ BestMatchArgs args, const __grid_constant__ MatchConfig c) {
  __shared__ uint4 key_storage[kRankKeys / 4];
  uint32_t* keys = reinterpret_cast<uint32_t*>(key_storage);
  const int64_t all = args.partition.num_src, blocks = divide_up(all, kRankSources);
  const int64_t image = blockIdx.x / blocks, from = image * all;
  const Partition p = image_partition(args, image);
  const int i = static_cast<int>(blockIdx.x % blocks) * kRankSources + static_cast<int>(threadIdx.x) / kRankLanes;
  const int part = threadIdx.x % kRankLanes;
  const uint64_t* candidates = static_cast<const uint64_t*>(args.workspace) + from * c.splits;
  auto candidate_of = [&](int source) {
    uint64_t best = 0;
    for (int64_t split = 0; split < c.splits; ++split) {
      const uint64_t other = candidates[split * all + source];
      best = other > best ? other : best;
    }
    return best;
  };

  const uint64_t own = i < p.num_src ? candidate_of(i) : 0;
  int32_t before = 0;
  for (int first = 0; first < p.num_src; first += kRankKeys) {
    for (int k = threadIdx.x; k < kRankKeys; k += kRankThreads) {
      const int source = first + k;
      const bool takes_part = source >= p.protected_src && source < p.num_src;
      keys[k] = takes_part ? candidate_key(candidate_of(source)) : kAbsentKey;
    }
    __syncthreads();
    before += count_before(keys, first, kRankKeys, part, kRankLanes, candidate_key(own), i);
    __syncthreads();
  }
  before = sum_of_lanes<kRankLanes>(before);
  if (part != 0 || i >= all) return;
  const bool takes_part = i >= p.protected_src && i < p.num_src;
  args.rank[from + i] = takes_part ? before : kNoRank;
  args.partner[from + i] = i < p.num_src ? candidate_index(own) : 0;
  if (args.score) args.score[from + i] = takes_part ? key_score(candidate_key(own)) : -INFINITY;
}

}  // namespace

void tiled_best_match(const char* op, const BestMatchArgs& args, const MatchConfig& c, cudaStream_t stream) {
  const int64_t num_src = args.partition.num_src;
  if (num_src == 0) return;
  with_type<false>(op, args.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* kernel = c.resident == Resident::sources ? tiled_match<T, Resident::sources> : tiled_match<T, Resident::none>;
    launch(op, kernel, c.tiles * c.splits * args.images, kTiledThreads, c.shared_bytes, stream, args, c,
           rows_aligned(args));
  });
  launch(op, rank_sources, divide_up(num_src, kRankSources) * args.images, kRankThreads, 0, stream, args, c);
}

std::size_t best_match_workspace_bytes(const BestMatchArgs& args) {
  return candidate_bytes(match_config(args, shared_limit(kName)), args.images, args.partition.num_src);
}

void best_match(const BestMatchArgs& args, cudaStream_t stream) {
  with_type<false>(kName, args.dtype, [&](auto zero) {
    if (args.images == 0 || args.partition.num_src == 0) return;
    const MatchConfig c = match_config(args, shared_limit(kName));
    if (!c.fused) return tiled_best_match(kName, args, c, stream);
    launch_fused_match<decltype(zero), FinishBest>(kName, args, c, stream);
  });
}

}  // namespace tokred::cuda
