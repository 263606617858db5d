// SPDX-License-Identifier: MIT
// Maps without their data: the members of each slot, and one map after another.
#include "../common/row_config.h"
#include "launch.h"
#include "map_build.cuh"
#include "ops.h"
#include "ptx.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kInvert = "invert";
constexpr const char* kCompose = "compose";

// One block an image, so the more warps the shorter the wait; 512 leaves room for two blocks on every architecture.
constexpr int kInvertThreads = 512;

__global__ void __launch_bounds__(kInvertThreads)
    invert_images(const __grid_constant__ InvertArgs args, bool cursor_in_shared) {
  const int64_t image = blockIdx.x, row0 = image * args.tokens, slot0 = image * args.num_out;
  int32_t* begin = args.begin + slot0;
  int32_t* cursor = cursor_in_shared ? reinterpret_cast<int32_t*>(dynamic_shared()) : begin;
  invert_image<kInvertThreads>(args.dest + row0, static_cast<int32_t>(args.tokens), static_cast<int32_t>(args.num_out),
                               static_cast<int32_t>(row0), 0, cursor, args.members + row0, begin, args.count + slot0);
}

__global__ void __launch_bounds__(kRowThreads) compose_tokens(const __grid_constant__ ComposeArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= args.images * args.tokens) return;
  const int32_t middle = args.first[row];
  args.dest[row] = middle < 0 ? -1 : args.second[row / args.tokens * args.middle + middle];
}

}  // namespace

void invert(const InvertArgs& args, cudaStream_t stream) {
  if (args.images == 0 || (args.tokens == 0 && args.num_out == 0)) return;
  const int64_t bytes = args.num_out * static_cast<int64_t>(sizeof(int32_t));
  const bool cursor_in_shared = bytes <= kSharedWithoutAsking - kReservedShared;
  launch(kInvert, invert_images, args.images, kInvertThreads, cursor_in_shared ? static_cast<int>(bytes) : 0, stream,
         args, cursor_in_shared);
}

void compose(const ComposeArgs& args, cudaStream_t stream) {
  const int64_t rows = args.images * args.tokens;
  if (rows == 0) return;
  launch(kCompose, compose_tokens, divide_up(rows, kRowThreads), kRowThreads, 0, stream, args);
}

}  // namespace tokred::cuda
