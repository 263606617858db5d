// SPDX-License-Identifier: MIT
// How the kernels that read rows (merge, unmerge and window_similarity) split them into vectors and lanes.
#pragma once

#include <cstdint>

#include "sizes.h"
#include "windows.h"

namespace tokred {

// Threads of a block: eight warps, so that enough blocks fit a multiprocessor for their loads to overlap.
constexpr int kRowThreads = 256;
// Blocks that a multiprocessor must hold at least: 32 warps, each thread with 64 registers, which suffices.
constexpr int kRowBlocks = 4;
constexpr int kRowWarps = kRowThreads / kLanes;
// Vectors a lane has in flight: with 16 bytes each that is 2 KB a warp, 64 KB a multiprocessor at four blocks.
constexpr int kInFlight = 4;
// A slot of more members than this is reduced by the whole block, its members cut evenly over the warps.
constexpr int kLongSlot = 32;

constexpr int kWideBytes = kUnitBytes;
constexpr int kNarrowBytes = 4;

struct RowConfig {
  int vector_bytes;  // 16, else 4, else one element
  int vectors;       // of a row
  int lanes_log2;    // lanes that share a row: the fewest that hold it in flight at once, at most a warp
  int rows_per_block;
};

// The log2 of the fewest lanes that hold at most `of_each` vectors of a row each; at most a warp.
inline int row_lanes_log2(int64_t vectors, int of_each) {
  int lanes_log2 = 0;
  while ((int64_t{of_each} << lanes_log2) < vectors && (1 << lanes_log2) < kLanes) ++lanes_log2;
  return lanes_log2;
}

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
  c.lanes_log2 = row_lanes_log2(c.vectors, kInFlight);
  c.rows_per_block = kRowThreads >> c.lanes_log2;
  return c;
}

// A group of lanes has a small window (see window_similarity.cu), and a lane reads neighbouring units of 16 bytes, a
// sector of memory, at a time. Each lane has up to kSectorsOfLane sectors of every row, so that the sums over the
// group stay a small part of the work; rows with enough sectors get enough neighbouring lanes to read a whole line.
constexpr int kSectorUnits = 2;
constexpr int kSectorsOfLane = 4;
constexpr int kLineLanesLog2 = 2;

struct WindowConfig {
  int32_t across, number;  // windows side by side, and all of an image
  int units;               // of a row, the last one perhaps in part
  int lanes_log2;          // lanes that share a small window
  int windows_per_block;   // small ones
  int blocks_per_image;
  bool whole;  // whether every row starts at a multiple of 16 bytes, and ends at one
};

// `alignment` as in row_config.
inline WindowConfig window_config(const Windows& w, int64_t channels, int element_bytes, uintptr_t alignment) {
  const int64_t row_bytes = channels * element_bytes;
  WindowConfig c{};
  c.across = w.grid_width / w.width;
  c.number = num_windows(w);
  c.units = static_cast<int>(divide_up(row_bytes, kUnitBytes));
  const int64_t sectors = divide_up(c.units, kSectorUnits);
  const int line = row_lanes_log2(sectors, 1);
  c.lanes_log2 = row_lanes_log2(sectors, kSectorsOfLane);
  if (c.lanes_log2 < kLineLanesLog2) c.lanes_log2 = line < kLineLanesLog2 ? line : kLineLanesLog2;
  c.windows_per_block = kRowThreads >> c.lanes_log2;
  c.blocks_per_image = static_cast<int>(divide_up(c.number, c.windows_per_block));
  c.whole = (alignment | static_cast<uintptr_t>(row_bytes)) % kUnitBytes == 0;
  return c;
}

}  // namespace tokred
