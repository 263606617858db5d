// SPDX-License-Identifier: MIT
// The best destination of each source, tile by tile on the tensor cores. The scores live in accumulators only.
//
// Fragment layouts below are those of mma.m16n8k16 (and m16n8k8, whose 32-bit words fall into the same places):
// lane l holds of the 16 x 8 product rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once

#include "../common/order.h"
#include "../common/slots.h"
#include "match_load.cuh"
#include "ptx.cuh"

namespace tokred::cuda {

// A warp multiplies its sources by 32 destinations, fragments of 16 rows by four of 8 columns.
constexpr int kWarpDestinations = kTileDestinations / kWarpColumns;
constexpr int kColumnFragments = kWarpDestinations / 8;

// The fewer warps share a tile, the more sources each has: fewer bytes of shared memory are read for a product, and
// more registers are needed. With 512 threads 32, with 256 threads 64.
template <int kThreads>
constexpr int kWarpSources = kTileSources * kWarpColumns * kLanes / kThreads;
template <int kThreads>
constexpr int kRowFragments = kWarpSources<kThreads> / 16;

// acc += A B^T of one step (32 bytes of a row) for one pair of fragments.
template <class T>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma_step(T{}, acc, a, b0, b1);
}

// Float32 as the sum of two TF32 numbers: what is left out of the product is the low times the low part, 2^-22 of it.
template <>
__device__ __forceinline__ void multiply<float>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
  const uint32_t b[2] = {b0, b1};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    a_high[k] = round_tf32(__uint_as_float(a[k]));
    a_low[k] = round_tf32(__uint_as_float(a[k]) - __uint_as_float(a_high[k]));
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    b_high[k] = round_tf32(__uint_as_float(b[k]));
    b_low[k] = round_tf32(__uint_as_float(b[k]) - __uint_as_float(b_high[k]));
  }
  // The tensor cores cut off what does not fit into their sum, always towards zero. So that over many channels this
  // does not add up, they sum one step, and the additions here round.
  float step[4] = {};
  mma_tf32(step, a_low, b_high[0], b_high[1]);
  mma_tf32(step, a_high, b_low[0], b_low[1]);
  mma_tf32(step, a_high, b_high[0], b_high[1]);
#pragma unroll
  for (int e = 0; e < 4; ++e) acc[e] += step[e];
}

template <int kRows>
using Accumulators = float[kRows][kColumnFragments][4];

template <int kRows>
__device__ __forceinline__ void zero(Accumulators<kRows>& acc) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int f = 0; f < kColumnFragments; ++f) {
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[r][f][e] = 0;
    }
  }
}

// Where a lane finds its rows of the fragments of A and of B: bytes into the sources and into the destinations.
// Pointers would take twice the registers.
template <int kRows>
struct LaneRows {
  int a[kRows];
  int b[kColumnFragments / 2];
};

// How many steps are in flight: float32 takes each apart, and has no registers for two.
template <class T>
constexpr int kUnrolled = sizeof(T) < sizeof(float) ? 2 : 1;

template <int kSteps, class T, int kRows>
__device__ __forceinline__ void multiply_steps(const char* sources, const char* destinations,
                                               const LaneRows<kRows>& rows, int steps, Accumulators<kRows>& acc) {
#pragma unroll kSteps
  for (int step = 0; step < steps; ++step) {
    uint32_t a[kRows][4];
#pragma unroll
    for (int f = 0; f < kRows; ++f) load_matrices(sources + rows.a[f], a[f]);
#pragma unroll
    for (int pair = 0; pair < kColumnFragments / 2; ++pair) {
      // Float32 takes each pair apart; all of them ahead of their products would need more registers than there are.
      if constexpr (sizeof(T) == sizeof(float)) __syncwarp();
      uint32_t b[4];
      load_matrices(destinations + rows.b[pair], b);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) multiply<T>(acc[r][2 * pair + k], a[r], b[2 * k], b[2 * k + 1]);
      }
    }
    sources += kStepUnits * kUnitBytes, destinations += kStepUnits * kUnitBytes;
  }
}

// One chunk of the streamed rows in a thread's registers: rows of the sources, unless those stay in shared memory, then
// rows of the destinations.
template <class T, Resident kResident, int kThreads>
struct Stream {
  static constexpr int kGroups = kRowGroups<kThreads>;
  static constexpr int kRows = stage_rows(kResident) / kGroups;
  static constexpr int kSourceRows = kResident == Resident::none ? kTileSources / kGroups : 0;
  static constexpr int kStageBytes = stage_rows(kResident) * kStagePitch;

  int32_t token[kRows];
  float squared[kRows];
  Unit<T> units[kRows];

  __device__ __forceinline__ void begin_tile(const Partition& p, int64_t image, int source0, int sources,
                                             int destination0, int destinations) {
    const int group = threadIdx.x / kChunkUnits;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = group + i * kGroups, column = row - kSourceRows * kGroups;
      if (i < kSourceRows) {
        token[i] = row < sources ? source_token(p, image, source0 + row) : -1;
      } else {
        token[i] = column < destinations ? destination_token(p, image, destination0 + column) : -1;
      }
      squared[i] = 0;
    }
  }

  __device__ __forceinline__ void load(const ImageMetric<T>& m, int chunk) {
    fetch<1>(m, token, chunk * kChunkUnits + static_cast<int>(threadIdx.x) % kChunkUnits, units);
  }

  __device__ __forceinline__ void store(char* stage) {
    add_squares<T>(units, squared);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      store_unit(stage, threadIdx.x / kChunkUnits + i * kGroups, kStagePitch, threadIdx.x % kChunkUnits, units[i].word);
    }
  }

  __device__ __forceinline__ void write_norms(float* of_sources, float* of_destinations) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = threadIdx.x / kChunkUnits + i * kGroups;
      const float inverse = row_inverse_norm(squared[i]);
      if (threadIdx.x % kChunkUnits != 0 || token[i] < 0) continue;
      if (i >= kSourceRows) {
        of_destinations[row - kSourceRows * kGroups] = inverse;
      } else if (of_sources) {
        of_sources[row] = inverse;
      }
    }
  }
};

// The best destination that a lane has seen for each of its rows, l / 4 + 8 k of its warp's.
template <int kLaneRows>
struct LaneBest {
  float score[kLaneRows];
  int32_t index[kLaneRows];
};

// Compares the scores of one tile, acc times the inverse norms, with the best so far. A lane meets its destinations in
// ascending order, so greater alone keeps the lowest of equals.
template <int kRows>
__device__ __forceinline__ void keep_best(const Accumulators<kRows>& acc, const float* source_norms, const float* norms,
                                          int row0, int sources, int column0, int destination0, int destinations,
                                          int protected_dst, LaneBest<2 * kRows>& best) {
  constexpr int kLaneRows = 2 * kRows;
  const int lane = threadIdx.x % kLanes;
  float inverse[kLaneRows];
#pragma unroll
  for (int k = 0; k < kLaneRows; ++k) inverse[k] = source_norms[min(row0 + lane / 4 + 8 * k, sources - 1)];
#pragma unroll
  for (int f = 0; f < kColumnFragments; ++f) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = column0 + f * 8 + lane % 4 * 2 + e;
      const int32_t j = destination0 + column;
      if (column >= destinations || j < protected_dst) continue;
#pragma unroll
      for (int k = 0; k < kLaneRows; ++k) {
        const float score = acc[k / 2][f][k % 2 * 2 + e] * inverse[k] * norms[column];
        if (score > best.score[k]) best.score[k] = score, best.index[k] = j;
      }
    }
  }
}

// Calls out(source, candidate) for sources [source0, source0 + 128) that exist, with their best among destinations
// [begin, end); see pack_candidate. With Resident::all the operands are in place already. Ends with a barrier.
template <class T, Resident kResident, int kThreads, class Out>
__device__ __forceinline__ void match_sources(const ImageMetric<T>& m, const Partition& p, int64_t image,
                                              const MatchConfig& c, const TileMemory& memory, int source0, int begin,
                                              int end, Out out) {
  constexpr bool kAll = kResident == Resident::all;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  constexpr int kRows = kRowFragments<kThreads>, kLaneRows = 2 * kRows;
  const int warp_row = warp / kWarpColumns * kWarpSources<kThreads>,
            warp_column = warp % kWarpColumns * kWarpDestinations;
  const int sources = min(kTileSources, p.num_src - source0);

  LaneBest<kLaneRows> best;
  const int32_t fallback = p.protected_dst < p.num_dst ? p.protected_dst : 0;  // if no number wins
#pragma unroll
  for (int k = 0; k < kLaneRows; ++k) best.score[k] = -INFINITY, best.index[k] = fallback;

  // Rows past the tile's end repeat its last one, which is there; keep_best leaves them out.
  LaneRows<kRows> rows;
#pragma unroll
  for (int f = 0; f < kRows; ++f) {
    const int row = min(warp_row + f * 16 + lane % 16, sources - 1);
    rows.a[f] = row * (kResident == Resident::none ? kStagePitch : c.pitch) + lane / 16 * kUnitBytes;
  }
  auto set_columns = [&](int destinations) {
#pragma unroll
    for (int f = 0; f < kColumnFragments / 2; ++f) {
      const int row = min(warp_column + f * 16 + lane / 16 * 8 + lane % 8, destinations - 1);
      rows.b[f] = row * (kAll ? c.pitch : kStagePitch) + lane / 8 % 2 * kUnitBytes;
    }
  };

  Accumulators<kRows> acc;
  if constexpr (kAll) {
    for (int destination0 = begin; destination0 < end; destination0 += kTileDestinations) {
      const int destinations = min(kTileDestinations, end - destination0);
      if (warp_row >= sources || warp_column >= destinations) break;
      __syncwarp();  // the tensor cores want the warp together, and keep_best let lanes go ahead
      set_columns(destinations);
      zero<kRows>(acc);
      const int row = p.num_src + destination0;
      multiply_steps<kUnrolled<T>, T, kRows>(memory.operands + source0 * c.pitch, memory.operands + row * c.pitch, rows,
                                             c.row_units / kStepUnits, acc);
      keep_best<kRows>(acc, memory.inverse_norms + source0, memory.inverse_norms + row, warp_row, sources, warp_column,
                       destination0, destinations, p.protected_dst, best);
    }
  } else {
    using Chunk = Stream<T, kResident, kThreads>;
    if constexpr (kResident == Resident::sources) {
      load_resident<kThreads>(m, sources, [&](int row) { return source_token(p, image, source0 + row); }, c, memory);
    }
    // All chunks of all tiles in one row: in each round the next one is on its way while the one before it is
    // multiplied; the first round only fetches.
    const int chunks = max(static_cast<int>(divide_up(c.row_units, kChunkUnits)), 1);
    Chunk stream;
    int destination0 = begin, chunk = -1, stage = 0, tile = 0;
#pragma unroll 1
    for (;;) {
      const bool ends_tile = chunk + 1 == chunks;
      const int next_destination0 = ends_tile ? destination0 + kTileDestinations : destination0;
      const int next_chunk = ends_tile ? 0 : chunk + 1, next_tile = tile + ends_tile;
      const bool more = next_destination0 < end;
      if (more) {
        if (next_chunk == 0) {
          stream.begin_tile(p, image, source0, sources, next_destination0,
                            min(kTileDestinations, end - next_destination0));
        }
        stream.load(m, next_chunk);
      }
      const int destinations = min(kTileDestinations, end - destination0);
      if (chunk >= 0 && warp_row < sources && warp_column < destinations) {
        __syncwarp();  // as above
        if (chunk == 0) zero<kRows>(acc), set_columns(destinations);
        const char* operands = memory.stages + stage * Chunk::kStageBytes;
        const int steps = min(kChunkUnits, c.row_units - chunk * kChunkUnits) / kStepUnits;
        // Unrolled, the steps of 512 threads would need the registers that hold the chunk on its way.
        multiply_steps<kThreads == kMatchThreads ? 1 : kUnrolled<T>, T, kRows>(
            kResident == Resident::none ? operands : memory.operands + chunk * kChunkUnits * kUnitBytes,
            operands + Chunk::kSourceRows * Chunk::kGroups * kStagePitch, rows, steps, acc);
        if (ends_tile) {
          keep_best<kRows>(acc, memory.inverse_norms,
                           memory.inverse_norms + kTileSources + tile % kStages * kTileDestinations, warp_row, sources,
                           warp_column, destination0, destinations, p.protected_dst, best);
        }
      }
      if (more) {
        stream.store(memory.stages + (stage ^ 1) * Chunk::kStageBytes);
        if (next_chunk + 1 == chunks) {
          stream.write_norms(next_tile == 0 ? memory.inverse_norms : nullptr,
                             memory.inverse_norms + kTileSources + next_tile % kStages * kTileDestinations);
        }
      }
      __syncthreads();
      if (!more) break;
      destination0 = next_destination0, chunk = next_chunk, tile = next_tile, stage ^= 1;
    }
  }

#pragma unroll
  for (int k = 0; k < kLaneRows; ++k) {
    unsigned long long candidate = pack_candidate(best.score[k], best.index[k]);
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const unsigned long long other = __shfl_xor_sync(kFullWarp, candidate, step);
      candidate = max(candidate, other);
    }
    if (lane % 4 == 0) {
      memory.partial[warp % kWarpColumns * kTileSources + warp_row + lane / 4 + 8 * k] = candidate;
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < sources) {
    uint64_t candidate = 0;
#pragma unroll
    for (int w = 0; w < kWarpColumns; ++w) {
      const uint64_t other = memory.partial[w * kTileSources + threadIdx.x];
      candidate = other > candidate ? other : candidate;
    }
    out(source0 + static_cast<int>(threadIdx.x), candidate);
  }
  __syncthreads();
}

}  // namespace tokred::cuda
