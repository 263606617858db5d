// SPDX-License-Identifier: MIT
// The map of a match that is known, several blocks an image.
#include "launch.h"
#include "map_build.cuh"
#include "map_parts.cuh"
#include "ops.h"
#include "ptx.cuh"
#include "stages.h"

namespace tokred::cuda {
namespace {

// Every block of an image computes all of `dest` for itself, in shared memory if it fits. If it does not, the blocks
// write the same values to the same places of args.dest, and each reads what it wrote.
__global__ void __launch_bounds__(kPartThreads)
    build_maps(const __grid_constant__ MatchMapArgs args, int32_t most_parts, bool dest_in_shared) {
  const int64_t image = blockIdx.x / most_parts, source0 = image * args.partition.num_src;
  const int32_t part = static_cast<int32_t>(blockIdx.x % most_parts);
  const int64_t row0 = args.starts_in ? args.starts_in[image] : image * args.tokens;
  const int32_t tokens = static_cast<int32_t>(args.starts_in ? args.starts_in[image + 1] - row0 : args.tokens);
  Partition p = args.starts_in ? of_tokens(args.partition, tokens) : args.partition;
  if (args.counts) p.r = args.counts[image];
  const int32_t num_out = num_slots(p), parts = parts_of(num_out);
  if (part >= parts) return;
  const int64_t slot_row = args.starts_out ? args.starts_out[image] : image * num_out;
  const int32_t slot0 = args.starts_out ? args.starts_out[image] : 0;  // packed maps number all images' slots as one
  int32_t* cursors = reinterpret_cast<int32_t*>(dynamic_shared());
  int32_t* dest = dest_in_shared ? cursors + kPartCursors : args.dest + row0;
  write_dest<kPartThreads>(p, image, tokens, args.rank + source0, args.partner + source0, slot0, dest);
  if (dest_in_shared) {
    const int32_t step = parts * kPartThreads;
    for (int32_t t = part * kPartThreads + threadIdx.x; t < tokens; t += step) args.dest[row0 + t] = dest[t];
  }
  to_csr_part(dest, tokens, num_out, part, static_cast<int32_t>(row0), slot0, cursors, args.members + row0,
              args.begin + slot_row, args.count + slot_row);
}

}  // namespace

void build_match_map(const char* op, const MatchMapArgs& args, cudaStream_t stream) {
  if (args.images == 0 || args.tokens == 0) return;
  // With a count for each image, the host does not know how many sources join, nor the number of slots.
  const int32_t parts = parts_of(args.counts ? kept_tokens(args.partition) : num_slots(args.partition));
  const int64_t longest = args.starts_in ? kept_tokens(args.partition) : args.tokens;
  const int64_t with_dest = (kPartCursors + longest) * static_cast<int64_t>(sizeof(int32_t));
  const bool dest_in_shared = with_dest <= shared_limit(op);
  const int bytes = dest_in_shared ? static_cast<int>(with_dest) : kPartCursors * static_cast<int>(sizeof(int32_t));
  launch(op, build_maps, args.images * parts, kPartThreads, bytes, stream, args, parts, dest_in_shared);
}

void build_match_map(const MatchMapArgs& args, cudaStream_t stream) {
  build_match_map("build_match_map", args, stream);
}

}  // namespace tokred::cuda
