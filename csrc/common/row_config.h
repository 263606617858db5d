// SPDX-License-Identifier: MIT
// How the movers (merge, unmerge and their gradients) cut rows into vectors and lanes.
#pragma once

#include <cstdint>

#include "sizes.h"

namespace tokred {

// Threads of a block: eight warps, so that enough blocks fit a multiprocessor for their loads to overlap.
constexpr int kRowThreads = 256;
// Blocks that a multiprocessor must hold at least: 32 warps, each thread with 64 registers, which all movers fit.
constexpr int kRowBlocks = 4;
constexpr int kRowWarps = kRowThreads / kLanes;
// Vectors a lane has in flight: with 16 bytes each that is 2 KB a warp, 64 KB a multiprocessor at four blocks.
constexpr int kInFlight = 4;
// A slot of more members than this is reduced by the whole block, its members cut evenly over the warps.
constexpr int kLongSlot = 32;

constexpr int kWideBytes = 16;
constexpr int kNarrowBytes = 4;

struct RowConfig {
  int vector_bytes;  // 16, else 4, else one element
  int vectors;       // of a row
  int lanes_log2;    // lanes that share a row: the fewest that hold it in flight at once, at most a warp
  int rows_per_block;
};

// `alignment` is the bitwise or of every address and row stride (in bytes) that is to be read or written in vectors.
inline RowConfig row_config(int64_t channels, int element_bytes, uintptr_t alignment) {
  const int64_t row_bytes = channels * element_bytes;
  alignment |= static_cast<uintptr_t>(row_bytes);
  RowConfig c{};
  c.vector_bytes = element_bytes;
  if (alignment % kWideBytes == 0) {
    c.vector_bytes = kWideBytes;
  } else if (element_bytes < kNarrowBytes && alignment % kNarrowBytes == 0) {
    c.vector_bytes = kNarrowBytes;
  }
  c.vectors = static_cast<int>(row_bytes / c.vector_bytes);
  while ((kInFlight << c.lanes_log2) < c.vectors && (1 << c.lanes_log2) < kLanes) ++c.lanes_log2;
  c.rows_per_block = kRowThreads >> c.lanes_log2;
  return c;
}

}  // namespace tokred
