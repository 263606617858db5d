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

// A warp multiplies 32 sources by 32 destinations: two fragments of 16 rows, four of 8 columns.
constexpr int kWarpTile = 32;
constexpr int kRowFragments = kWarpTile / 16;
constexpr int kColumnFragments = kWarpTile / 8;
static_assert(kWarpColumns * kWarpTile == kTileDestinations, "the warps must cover the tile");
static_assert(kMatchThreads / kLanes / kWarpColumns * kWarpTile == kTileSources, "the warps must cover the tile");

// Rows of one lane's accumulators: l / 4 + 8 k for k in 0..3.
constexpr int kLaneRows = 2 * kRowFragments;

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
  mma_tf32(acc, a_low, b_high[0], b_high[1]);
  mma_tf32(acc, a_high, b_low[0], b_low[1]);
  mma_tf32(acc, a_high, b_high[0], b_high[1]);
}

using Accumulators = float[kRowFragments][kColumnFragments][4];

// Where a lane finds its rows of the fragments of A and of B: bytes into the operands. Pointers would take twice the
// registers.
struct LaneRows {
  int a[kRowFragments];
  int b[kColumnFragments / 2];
};

template <int kUnrolled, class T>
__device__ __forceinline__ void multiply_steps(const char* operands, const LaneRows& rows, int steps,
                                               Accumulators& acc) {
#pragma unroll kUnrolled
  for (int step = 0; step < steps; ++step, operands += kStepUnits * kUnitBytes) {
    uint32_t a[kRowFragments][4], b[kColumnFragments / 2][4];
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) load_matrices(operands + rows.a[f], a[f]);
#pragma unroll
    for (int f = 0; f < kColumnFragments / 2; ++f) load_matrices(operands + rows.b[f], b[f]);
#pragma unroll
    for (int r = 0; r < kRowFragments; ++r) {
#pragma unroll
      for (int f = 0; f < kColumnFragments; ++f) {
        multiply<T>(acc[r][f], a[r], b[f / 2][f % 2 * 2], b[f / 2][f % 2 * 2 + 1]);
      }
    }
  }
}

// Streams the rows of one tile through shared memory, chunk by chunk, and leaves their inverse norms there.
template <class T>
__device__ __forceinline__ void multiply_streamed(const ImageMetric<T>& m, const Partition& p, int64_t image,
                                                  int row_units, const TileMemory& memory, int source0, int sources,
                                                  int destination0, int destinations, bool busy, const LaneRows& rows,
                                                  Accumulators& acc) {
  const int group = threadIdx.x / kChunkUnits, lane_unit = threadIdx.x % kChunkUnits;
  int32_t token[kRowsPerThread];
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    const int row = group + i * kRowGroups, column = row - kTileSources;
    token[i] = row < kTileSources      ? (row < sources ? source_token(p, image, source0 + row) : -1)
               : column < destinations ? destination_token(p, image, destination0 + column)
                                       : -1;
  }
  float squared[kRowsPerThread] = {};
  Unit<T> units[kRowsPerThread];
  auto store = [&](int stage) {
    add_squares<T>(units, squared);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      store_unit(memory.operands + stage * kStageBytes, group + i * kRowGroups, kStagePitch, lane_unit, units[i].word);
    }
  };

  // In each round the next chunk is on its way while the one before it is multiplied; the first round only fetches.
#pragma unroll 1
  for (int unit0 = -kChunkUnits, stage = 1; unit0 < row_units; unit0 += kChunkUnits, stage ^= 1) {
    const int next = unit0 + kChunkUnits;
    if (next < row_units) fetch<1>(m, token, next + lane_unit, units);
    if (busy && unit0 >= 0) {
      const int steps = min(kChunkUnits, row_units - unit0) / kStepUnits;
      // Unrolled, these steps would need the registers that hold the chunk on its way.
      multiply_steps<1, T>(memory.operands + stage * kStageBytes, rows, steps, acc);
    }
    if (next < row_units) {
      store(stage ^ 1);
    } else {
      write_norms(squared, token, memory.inverse_norms + group);
    }
    __syncthreads();
  }
}

// Calls out(source, candidate) for sources [source0, source0 + 128) that exist, with their best among destinations
// [begin, end); see pack_candidate. With kResident the operands are in place already. Ends with a barrier.
template <class T, bool kResident, class Out>
__device__ __forceinline__ void match_sources(const ImageMetric<T>& m, const Partition& p, int64_t image,
                                              const MatchConfig& c, const TileMemory& memory, int source0, int begin,
                                              int end, Out out) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int warp_row = warp / kWarpColumns * kWarpTile, warp_column = warp % kWarpColumns * kWarpTile;
  const int sources = min(kTileSources, p.num_src - source0);
  const int pitch = kResident ? c.pitch : kStagePitch;
  const int a_row = kResident ? source0 : 0;  // where the tile's sources start among the rows in shared memory

  float best[kLaneRows];
  int32_t best_index[kLaneRows];
  const int32_t fallback = p.protected_dst < p.num_dst ? p.protected_dst : 0;  // where no number wins
#pragma unroll
  for (int k = 0; k < kLaneRows; ++k) best[k] = -INFINITY, best_index[k] = fallback;

  for (int destination0 = begin; destination0 < end; destination0 += kTileDestinations) {
    const int destinations = min(kTileDestinations, end - destination0);
    const int b_row = kResident ? p.num_src + destination0 : kTileSources;
    const bool busy = warp_row < sources && warp_column < destinations;
    __syncwarp();  // the tensor cores want the warp together, and the epilogue before this tile let lanes go ahead

    // Rows past the tile's end repeat its last one, which is there; the epilogue leaves them out.
    LaneRows rows;
#pragma unroll
    for (int f = 0; f < kRowFragments; ++f) {
      const int row = a_row + min(warp_row + f * 16 + lane % 16, sources - 1);
      rows.a[f] = row * pitch + lane / 16 * kUnitBytes;
    }
#pragma unroll
    for (int f = 0; f < kColumnFragments / 2; ++f) {
      const int row = b_row + min(warp_column + f * 16 + lane / 16 * 8 + lane % 8, destinations - 1);
      rows.b[f] = row * pitch + lane / 8 % 2 * kUnitBytes;
    }

    Accumulators acc = {};
    if constexpr (kResident) {
      if (busy) multiply_steps<2, T>(memory.operands, rows, c.row_units / kStepUnits, acc);
    } else {
      multiply_streamed<T>(m, p, image, c.row_units, memory, source0, sources, destination0, destinations, busy, rows,
                           acc);
    }
    if (!busy) continue;

    float a_inverse[kLaneRows];
#pragma unroll
    for (int k = 0; k < kLaneRows; ++k) {
      a_inverse[k] = memory.inverse_norms[a_row + min(warp_row + lane / 4 + 8 * k, sources - 1)];
    }
#pragma unroll
    for (int f = 0; f < kColumnFragments; ++f) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = warp_column + f * 8 + lane % 4 * 2 + e;
        const int32_t j = destination0 + column;
        if (column >= destinations || j < p.protected_dst) continue;
        const float b_inverse = memory.inverse_norms[b_row + column];
#pragma unroll
        for (int k = 0; k < kLaneRows; ++k) {
          const float score = acc[k / 2][f][k % 2 * 2 + e] * a_inverse[k] * b_inverse;
          // A lane meets its destinations in ascending order, so greater alone keeps the lowest of equals.
          if (score > best[k]) best[k] = score, best_index[k] = j;
        }
      }
    }
  }

#pragma unroll
  for (int k = 0; k < kLaneRows; ++k) {
    unsigned long long candidate = pack_candidate(best[k], best_index[k]);
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
