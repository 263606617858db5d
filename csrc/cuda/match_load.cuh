// SPDX-License-Identifier: MIT
// The metric on its way into shared memory: averaged over heads, its rows' inverse norms beside it.
#pragma once

#include "../common/match_config.h"
#include "block_scan.cuh"
#include "units.cuh"

namespace tokred::cuda {

// Eight lanes load a chunk of a row, so a thread has every 64th row of a tile.
constexpr int kRowGroups = kMatchThreads / kChunkUnits;
constexpr int kRowsPerThread = kTileRows / kRowGroups;

// Heads whose loads a thread has in flight together when it averages over them.
constexpr int kHeadsAtOnce = 2;

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
  const int left = token < 0 ? 0 : m.channels - unit * kUnitElements<T>;
  return load_unit(m.data + head * m.stride_h + token * m.stride_n + unit * kUnitElements<T>, left, m.aligned);
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

}  // namespace tokred::cuda
