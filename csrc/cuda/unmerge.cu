// SPDX-License-Identifier: MIT
// Unmerge: every token reads the row of its slot.
#include "ops.h"
#include "row_copy.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "unmerge";

// T is the floating type of the elements' size that is quickest to compile: rows are copied bit by bit.
template <class T, int kElements>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    unmerge_rows(const __grid_constant__ UnmergeArgs args, const __grid_constant__ RowConfig c) {
  const RowGroup g(c);
  if (g.row >= args.images * args.tokens) return;
  const int64_t image = g.row / args.tokens;
  const int32_t slot = args.dest[g.row];
  const T* source = slot < 0 ? nullptr : static_cast<const T*>(args.y) + (image * args.num_out + slot) * args.y_stride;
  move_row<T, kElements>(g, c, source, Acc<T>(1), static_cast<T*>(args.x) + g.row * args.channels);
}

template <class T>
void launch_unmerge(const UnmergeArgs& args, cudaStream_t stream) {
  const RowConfig c =
      row_config(args.channels, sizeof(T), address(args.y) | address(args.x) | args.y_stride * sizeof(T));
  const int64_t rows = args.images * args.tokens;
  with_width<T>(c, [&](auto elements) {
    launch(kName, unmerge_rows<T, elements>, divide_up(rows, c.rows_per_block), kRowThreads, 0, stream, args, c);
  });
}

}  // namespace

void unmerge(const UnmergeArgs& args, cudaStream_t stream) {
  if (args.images == 0 || args.tokens == 0 || args.channels == 0) return;
  switch (element_bytes(args.dtype)) {
    case 2:
      return launch_unmerge<__half>(args, stream);
    case 4:
      return launch_unmerge<float>(args, stream);
    case 8:
      return launch_unmerge<double>(args, stream);
  }
}

}  // namespace tokred::cuda
