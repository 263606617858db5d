// SPDX-License-Identifier: MIT
// Bipartite matching. Images of ViT size take one launch, an image a block, from metric to finished map. Larger ones
// take three: those of rank_candidates, and that of build_match_map.
#include "map_build.cuh"
#include "match_image.cuh"
#include "ops.h"
#include "stages.h"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "bipartite_match";

struct FinishMap {
  using Args = MatchArgs;

  static __device__ __forceinline__ void run(const MatchArgs& args, const Partition& p, int64_t image,
                                             const Matched& matched) {
    const int tokens = static_cast<int>(args.tokens), num_out = num_slots(p);
    int32_t* rank = reinterpret_cast<int32_t*>(matched.operands);
    int32_t* dest = rank + p.num_src;
    int32_t* cursor = dest + tokens;
    rank_in_block(p, matched.keys, rank);
    __syncthreads();
    write_dest<kMatchThreads>(p, image, tokens, rank, matched.best, 0, dest);
    const int64_t row0 = image * tokens, slot0 = image * num_out;
    for (int t = threadIdx.x; t < tokens; t += kMatchThreads) args.dest[row0 + t] = dest[t];
    to_csr_image<kMatchThreads>(dest, tokens, num_out, static_cast<int32_t>(row0), 0, cursor, args.members + row0,
                                args.begin + slot0, args.count + slot0);
  }
};

}  // namespace

std::size_t match_workspace_bytes(const MatchArgs& args) {
  const MatchConfig c = match_config(args, shared_limit(kName));
  if (c.fused) return 0;
  const int64_t sources = args.images * args.partition.num_src;
  return candidate_bytes(c, args.images, args.partition.num_src) + 2 * sizeof(int32_t) * sources;
}

void bipartite_match(const MatchArgs& args, cudaStream_t stream) {
  with_type<false>(kName, args.dtype, [&](auto zero) {
    if (args.images == 0 || args.tokens == 0) return;
    const MatchConfig c = match_config(args, shared_limit(kName));
    if (c.fused) return launch_fused_match<decltype(zero), FinishMap>(kName, args, c, stream);

    BestMatchArgs best{};
    static_cast<MatchProblem&>(best) = args;
    best.workspace = args.workspace;
    const int64_t num_src = args.partition.num_src;
    best.rank =
        reinterpret_cast<int32_t*>(static_cast<char*>(args.workspace) + candidate_bytes(c, args.images, num_src));
    best.partner = best.rank + args.images * num_src;
    tiled_rank_candidates(kName, best, c, stream);

    MatchMapArgs map{};
    map.partner = best.partner, map.rank = best.rank;
    map.images = args.images, map.tokens = args.tokens;
    map.partition = args.partition;
    map.dest = args.dest, map.members = args.members, map.begin = args.begin, map.count = args.count;
    build_match_map(kName, map, stream);
  });
}

}  // namespace tokred::cuda
