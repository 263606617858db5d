// SPDX-License-Identifier: MIT
// The map of a match that is known, a block an image.
#include "launch.h"
#include "map_build.cuh"
#include "ops.h"
#include "ptx.cuh"
#include "stages.h"

namespace tokred::cuda {
namespace {

// One block an image, so the more warps the shorter the wait; 512 leaves room for two blocks on every architecture.
constexpr int kMapThreads = 512;

__global__ void __launch_bounds__(kMapThreads)
    build_maps(const __grid_constant__ MatchMapArgs args, bool cursor_in_shared) {
  const int64_t image = blockIdx.x, source0 = image * args.partition.num_src;
  const int64_t row0 = args.starts_in ? args.starts_in[image] : image * args.tokens;
  const int32_t tokens = static_cast<int32_t>(args.starts_in ? args.starts_in[image + 1] - row0 : args.tokens);
  Partition p = args.starts_in ? of_tokens(args.partition, tokens) : args.partition;
  if (args.counts) p.r = args.counts[image];
  const int32_t num_out = num_slots(p);
  const int64_t slot_row = args.starts_out ? args.starts_out[image] : image * num_out;
  const int32_t slot0 = args.starts_out ? args.starts_out[image] : 0;  // packed maps number all images' slots as one
  int32_t* dest = args.dest + row0;
  int32_t* begin = args.begin + slot_row;
  int32_t* cursor = cursor_in_shared ? reinterpret_cast<int32_t*>(dynamic_shared()) : begin;
  write_dest<kMapThreads>(p, image, tokens, args.rank + source0, args.partner + source0, slot0, dest);
  invert_image<kMapThreads>(dest, tokens, num_out, static_cast<int32_t>(row0), slot0, cursor, args.members + row0,
                            begin, args.count + slot_row);
}

}  // namespace

void build_match_map(const char* op, const MatchMapArgs& args, cudaStream_t stream) {
  if (args.images == 0 || args.tokens == 0) return;
  // How many join, and so the slots of an image, is not known here where each image has a count of its own.
  const int64_t slots = args.counts ? kept_tokens(args.partition) : num_slots(args.partition);
  const int64_t bytes = slots * static_cast<int64_t>(sizeof(int32_t));
  const bool cursor_in_shared = bytes <= shared_limit(op);
  launch(op, build_maps, args.images, kMapThreads, cursor_in_shared ? static_cast<int>(bytes) : 0, stream, args,
         cursor_in_shared);
}

void match_map(const MatchMapArgs& args, cudaStream_t stream) { build_match_map("match_map", args, stream); }

}  // namespace tokred::cuda
