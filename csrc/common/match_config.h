// SPDX-License-Identifier: MIT
// How a match is cut into tiles and launches: a pure function of shape, dtype and shared memory.
#pragma once

#include <algorithm>
#include <cstddef>

#include "partition.h"
#include "sizes.h"

namespace tokred {

// A block's tile of scores. 128 x 128 lets a ViT of 197 tokens be one tile, its metric read once, and leaves each of
// 512 threads 32 accumulators.
constexpr int kTileSources = 128;
constexpr int kTileDestinations = 128;
constexpr int kTileRows = kTileSources + kTileDestinations;
constexpr int kMatchThreads = 512;

// Units of a row that are loaded at a time: eight lanes read 128 bytes, a whole line.
constexpr int kChunkUnits = 8;
// One step of the tensor cores (16 halves, or 8 floats) is this many units deep, whatever the dtype.
constexpr int kStepUnits = 2;
// Chunks in shared memory when the metric is streamed: one is multiplied while the next is on its way.
constexpr int kStages = 2;

// Rows are an odd number of units apart, so that eight rows of one column lie in different banks.
constexpr int pitch_bytes(int units) { return (units | 1) * kUnitBytes; }
constexpr int kStagePitch = pitch_bytes(kChunkUnits);

// What of the metric stays in shared memory, and what is streamed through it in chunks, as often as a tile needs it.
enum class Resident : int {
  none,
  sources,  // those of a tile, while all destinations go by
  all,      // of an image
};

// Rows of a chunk in shared memory.
constexpr int stage_rows(Resident resident) { return resident == Resident::none ? kTileRows : kTileDestinations; }
// Inverse norms of a streamed tile: one for each source and, since the next tile of destinations loads while this one
// is compared, one for each destination of each stage.
constexpr int kStreamedNorms = kTileSources + kStages * kTileDestinations;

// Warps side by side over a tile's destinations; each brings its own best to the block's.
constexpr int kWarpColumns = 4;

// Up to here one block does an image in one launch: 1,024 patches and what tokens lead them.
constexpr int64_t kMaxFusedTokens = 1088;
// The tiled match cuts the destinations until there are this many blocks: two for each multiprocessor of an H100.
constexpr int64_t kTargetBlocks = 264;
// One block that streams more than this per image takes longer than several blocks and the additional launches. With at
// most kFewImages images, one block per image leaves half of the multiprocessors of an H100 idle.
constexpr int64_t kMostStreamedBytes = 1 << 20;
constexpr int64_t kFewImages = kTargetBlocks / 4;
// Candidates per source that the ranking launch then has to combine.
constexpr int64_t kMaxSplits = 16;
// The ranking launch: lanes that share the counting for one source, sources a block ranks, keys in shared memory at a
// time. Several lanes a source cut the work finely enough for all multiprocessors where the images are few.
constexpr int kRankThreads = 256;
constexpr int kRankLanes = 4;
constexpr int kRankSources = kRankThreads / kRankLanes;
constexpr int kRankKeys = 1024;

struct MatchConfig {
  bool fused;  // one launch, an image a block; else match and rank in two, and the map, if wanted, in a third
  Resident resident;
  int row_units;       // 16-byte units of a row that are multiplied: D rounded up to a step
  int pitch;           // bytes between resident rows
  int stages_offset;   // bytes into shared memory: chunks, kStagePitch bytes between their rows
  int norms_offset;    // bytes into shared memory: inverse norms, a float each
  int partial_offset;  // the warps' candidates of a tile
  int best_offset;     // fused: each source's key, padded to whole 16 bytes, then its destination
  int shared_bytes;    // of the match kernel
  int64_t tiles;       // source tiles of an image
  int64_t splits;      // cuts of the destinations, each with a candidate per source; 1 when fused
};

// Keys are read four at a time, so their array is padded to whole 16 bytes.
constexpr int padded_keys(int num_src) { return static_cast<int>(round_up(num_src, kUnitBytes / sizeof(uint32_t))); }

namespace detail {

// Offsets of a layout that keeps `rows` rows, or streams; what the operands take is at least `least_bytes`.
inline MatchConfig layout(MatchConfig c, Resident resident, std::size_t rows, std::size_t least_bytes, int num_src) {
  c.resident = resident;
  c.pitch = pitch_bytes(c.row_units);
  std::size_t offset = rows * c.pitch;
  c.stages_offset = static_cast<int>(offset);
  if (resident != Resident::all) offset += kStages * stage_rows(resident) * kStagePitch, rows = kStreamedNorms;
  offset = round_up(std::max(offset, least_bytes), kUnitBytes);
  c.norms_offset = static_cast<int>(offset);
  offset = round_up(offset + rows * sizeof(float), kUnitBytes);
  c.partial_offset = static_cast<int>(offset);
  offset += sizeof(uint64_t) * kWarpColumns * kTileSources;
  c.best_offset = static_cast<int>(offset);
  if (c.fused) offset += (sizeof(uint32_t) + sizeof(int32_t)) * padded_keys(num_src);
  c.shared_bytes = static_cast<int>(offset);
  return c;
}

}  // namespace detail

// Bytes that are loaded to match an image: every tile loads its sources and destinations, of all heads.
inline int64_t streamed_bytes(const MatchProblem& args, const MatchConfig& c) {
  const Partition& p = args.partition;
  const int64_t rows = divide_up(p.num_dst, kTileDestinations) * p.num_src + c.tiles * p.num_dst;
  return rows * args.heads * c.row_units * kUnitBytes;
}

// `shared_limit` is the most dynamic shared memory of a block, in bytes. Does not look at r.
inline MatchConfig match_config(const MatchProblem& args, int64_t shared_limit) {
  const Partition& p = args.partition;
  MatchConfig c{};
  c.row_units =
      static_cast<int>(round_up(args.channels * element_bytes(args.dtype), kStepUnits * kUnitBytes) / kUnitBytes);
  c.tiles = divide_up(p.num_src, kTileSources);
  c.splits = 1;

  c.fused = args.tokens <= kMaxFusedTokens;
  if (c.fused) {
    const std::size_t rows = static_cast<std::size_t>(p.num_src) + p.num_dst;
    // Once matched, the operands' place holds the map under construction: ranks, slots and, for each slot, a cursor.
    const std::size_t map_bytes = sizeof(int32_t) * (static_cast<std::size_t>(p.num_src) + 2 * args.tokens);
    // A long metric must not overflow the offsets; it is streamed anyway.
    if (rows * pitch_bytes(c.row_units) <= static_cast<std::size_t>(shared_limit)) {
      const MatchConfig whole = detail::layout(c, Resident::all, rows, map_bytes, p.num_src);
      if (whole.shared_bytes <= shared_limit) return whole;
    }
    const MatchConfig streamed = detail::layout(c, Resident::none, 0, map_bytes, p.num_src);
    const bool spread = args.images <= kFewImages && streamed_bytes(args, c) > kMostStreamedBytes;
    if (streamed.shared_bytes <= shared_limit && !spread) return streamed;
    c.fused = false;
  }
  const int64_t blocks = std::max<int64_t>(c.tiles * args.images, 1);
  const int64_t most = std::max<int64_t>(std::min(divide_up(p.num_dst, kTileDestinations), kMaxSplits), 1);
  c.splits = std::min(most, divide_up(kTargetBlocks, blocks));
  if (int64_t{kTileSources} * pitch_bytes(c.row_units) <= shared_limit) {
    const MatchConfig kept = detail::layout(c, Resident::sources, kTileSources, 0, p.num_src);
    if (kept.shared_bytes <= shared_limit) return kept;
  }
  return detail::layout(c, Resident::none, 0, 0, p.num_src);
}

// Bytes of device memory that the tiled match keeps for its ranking launch: (B, splits, num_src), see pack_candidate.
inline std::size_t candidate_bytes(const MatchConfig& c, int64_t images, int64_t num_src) {
  return c.fused ? 0 : sizeof(uint64_t) * static_cast<std::size_t>(images * c.splits * num_src);
}

}  // namespace tokred
