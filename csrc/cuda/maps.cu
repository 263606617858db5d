// SPDX-License-Identifier: MIT
// Maps without their data: the members of each slot, and one map after another.
#include "../common/row_config.h"
#include "device.h"
#include "launch.h"
#include "map_parts.cuh"
#include "ops.h"
#include "ptx.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kToCsr = "to_csr";
constexpr const char* kCompose = "compose";

__global__ void __launch_bounds__(kPartThreads) to_csr_images(const __grid_constant__ ToCsrArgs args, int32_t parts) {
  const int64_t image = blockIdx.x / parts, row0 = image * args.tokens, slot0 = image * args.num_out;
  to_csr_part(args.dest + row0, static_cast<int32_t>(args.tokens), static_cast<int32_t>(args.num_out),
              static_cast<int32_t>(blockIdx.x % parts), static_cast<int32_t>(row0), 0,
              reinterpret_cast<int32_t*>(dynamic_shared()), args.members + row0, args.begin + slot0,
              args.count + slot0);
}

__global__ void __launch_bounds__(kRowThreads) compose_tokens(const __grid_constant__ ComposeArgs args) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (row >= args.images * args.tokens) return;
  const int32_t middle = args.first[row];
  args.dest[row] = middle < 0 ? -1 : args.second[row / args.tokens * args.middle + middle];
}

}  // namespace

void to_csr(const ToCsrArgs& args, cudaStream_t stream) {
  if (args.images == 0 || (args.tokens == 0 && args.num_out == 0)) return;
  const int32_t parts = parts_of(args.num_out);
  launch(kToCsr, to_csr_images, args.images * parts, kPartThreads, kPartCursors * static_cast<int>(sizeof(int32_t)),
         stream, args, parts);
}

void compose(const ComposeArgs& args, cudaStream_t stream) {
  const int64_t rows = args.images * args.tokens;
  if (rows == 0) return;
  launch(kCompose, compose_tokens, divide_up(rows, kRowThreads), kRowThreads, 0, stream, args);
}

std::string why_unusable(const std::string& architectures) {
  return load_failure(reinterpret_cast<const void*>(compose_tokens), architectures);
}

}  // namespace tokred::cuda
