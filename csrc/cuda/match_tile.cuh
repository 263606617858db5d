// SPDX-License-Identifier: MIT
// The best destination of each source, tile by tile on the tensor cores. The scores live in accumulators only.
//
// Fragment layouts below are those of mma.m16n8k16 (and m16n8k8, whose 32-bit words fall into the same places):
// lane l holds of the 16 x 8 product rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
#pragma once

#include "../common/match_config.h"
#include "../common/order.h"
#include "block_scan.cuh"
#include "dtype.cuh"
#include "ptx.cuh"

namespace tokred::cuda {

// A warp multiplies 32 sources by 32 destinations: two fragments of 16 rows, four of 8 columns.
constexpr int kWarpTile = 32;
constexpr int kRowFragments = kWarpTile / 16;
constexpr int kColumnFragments = kWarpTile / 8;
static_assert(kWarpColumns * kWarpTile == kTileDestinations, "the warps must cover the tile");
static_assert(kMatchThreads / kLanes / kWarpColumns * kWarpTile == kTileSources, "the warps must cover the tile");

// Eight lanes load a chunk of a row, so a thread has every 64th row of a tile.
constexpr int kRowGroups = kMatchThreads / kChunkUnits;
constexpr int kRowsPerThread = kTileRows / kRowGroups;

// Heads whose loads a thread has in flight together when it averages over them.
constexpr int kHeadsAtOnce = 2;

// Rows of one lane's accumulators: l / 4 + 8 k for k in 0..3.
constexpr int kLaneRows = 2 * kRowFragments;

template <class T>
constexpr int kUnitElements = kUnitBytes / static_cast<int>(sizeof(T));

template <class T>
using Unit = Vector<T, kUnitElements<T>>;

// The metric of one image, (H, N, D).
template <class T>
struct ImageMetric {
  const T* data;
  int64_t stride_h, stride_n;
  int heads, channels;
  bool aligned;  // whether every row starts at a multiple of 16 bytes
};

struct TileMemory {
  char* operands;
  float* inverse_norms;  // of the rows in `operands`
  uint64_t* partial;     // (kWarpColumns, kTileSources)
};

// 16 bytes of a token's row, zero past its end, and zero for an absent token (-1).
template <class T>
__device__ __forceinline__ Unit<T> load_unit(const ImageMetric<T>& m, int head, int32_t token, int unit) {
  constexpr int kElements = kUnitElements<T>;
  Unit<T> v;
  v.word = make_uint4(0, 0, 0, 0);
  const int left = token < 0 ? 0 : m.channels - unit * kElements;
  if (left <= 0) return v;
  const T* row = m.data + head * m.stride_h + token * m.stride_n + unit * kElements;
  if (m.aligned && left >= kElements) {
    v.word = __ldg(reinterpret_cast<const uint4*>(row));
  } else {
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      if (e < left) v.element[e] = row[e];
    }
  }
  return v;
}

// One unit of each of a thread's rows, averaged over heads. The means of kAtOnce rows are in the making at a time: each
// takes the registers of a unit in float.
template <int kAtOnce, class T>
__device__ __forceinline__ void fetch(const ImageMetric<T>& m, const int32_t (&token)[kRowsPerThread], int unit,
                                      Unit<T> (&out)[kRowsPerThread]) {
  constexpr int kElements = kUnitElements<T>;
  if (m.heads == 1) {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) out[i] = load_unit(m, 0, token[i], unit);
    return;
  }
  const float heads = static_cast<float>(m.heads), inverse = 1.0f / heads;
#pragma unroll
  for (int first = 0; first < kRowsPerThread; first += kAtOnce) {
    float sum[kAtOnce][kElements] = {};
#pragma unroll 1
    for (int h = 0; h < m.heads; h += kHeadsAtOnce) {
      // All loads before the first sum, so that they are in flight together.
      Unit<T> v[kHeadsAtOnce][kAtOnce];
#pragma unroll
      for (int k = 0; k < kHeadsAtOnce; ++k) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) v[k][i] = load_unit(m, h + k, h + k < m.heads ? token[first + i] : -1, unit);
      }
#pragma unroll
      for (int k = 0; k < kHeadsAtOnce; ++k) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int e = 0; e < kElements; ++e) sum[i][e] += widen(v[k][i].element[e]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        // The quotient and what it leaves over: rounded as a division is, at a third of its instructions.
        const float quotient = sum[i][e] * inverse;
        out[first + i].element[e] = narrow<T>(fmaf(fmaf(-quotient, heads, sum[i][e]), inverse, quotient));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void add_squares(const Unit<T> (&units)[kRowsPerThread], float (&squared)[kRowsPerThread]) {
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
    for (int e = 0; e < kUnitElements<T>; ++e) {
      const float v = widen(units[i].element[e]);
      squared[i] += v * v;
    }
  }
}

// Sums the squares of a row's eight lanes, always in the same order, and writes the inverse norm of each row present.
__device__ __forceinline__ void write_norms(const float (&squared)[kRowsPerThread],
                                            const int32_t (&token)[kRowsPerThread], float* norms_of_group) {
#pragma unroll
  for (int i = 0; i < kRowsPerThread; ++i) {
    float sum = squared[i];
#pragma unroll
    for (int step = kChunkUnits / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
    if (threadIdx.x % kChunkUnits == 0 && token[i] >= 0) norms_of_group[i * kRowGroups] = inverse_norm(sum);
  }
}

__device__ __forceinline__ void store_unit(char* operands, int row, int pitch, int unit, uint4 word) {
  *reinterpret_cast<uint4*>(operands + row * pitch + unit * kUnitBytes) = word;
}

// Puts all of an image into shared memory: sources, then destinations. Ends with a barrier.
template <class T>
__device__ __forceinline__ void load_resident(const ImageMetric<T>& m, const Partition& p, int64_t image,
                                              const MatchConfig& c, const TileMemory& memory) {
  const int group = threadIdx.x / kChunkUnits, lane_unit = threadIdx.x % kChunkUnits;
  const int rows = p.num_src + p.num_dst;
  for (int start = 0; start < rows; start += kTileRows) {
    int32_t token[kRowsPerThread];
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int row = start + group + i * kRowGroups;
      token[i] = row < p.num_src ? source_token(p, image, row)
                 : row < rows    ? destination_token(p, image, row - p.num_src)
                                 : -1;
    }
    float squared[kRowsPerThread] = {};
    for (int unit0 = 0; unit0 < c.row_units; unit0 += kChunkUnits) {
      const int unit = unit0 + lane_unit;
      Unit<T> units[kRowsPerThread];
      fetch<kRowsPerThread>(m, token, unit, units);
      add_squares<T>(units, squared);
#pragma unroll
      for (int i = 0; i < kRowsPerThread; ++i) {
        if (token[i] >= 0 && unit < c.row_units) {
          store_unit(memory.operands, start + group + i * kRowGroups, c.pitch, unit, units[i].word);
        }
      }
    }
    write_norms(squared, token, memory.inverse_norms + start + group);
  }
  __syncthreads();
}

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
#pragma unroll
  for (int k = 0; k < kLaneRows; ++k) best[k] = -INFINITY, best_index[k] = p.protected_dst;

  for (int destination0 = begin; destination0 < end; destination0 += kTileDestinations) {
    const int destinations = min(kTileDestinations, end - destination0);
    const int b_row = kResident ? p.num_src + destination0 : kTileSources;
    const bool busy = warp_row < sources && warp_column < destinations;

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
