// SPDX-License-Identifier: MIT
// Loads the metric into shared memory, averaged over heads, together with the inverse norms of its rows.
#pragma once

#include "../common/match_config.h"
#include "block_scan.cuh"
#include "units.cuh"

namespace tokred::cuda {

// Eight lanes load a chunk of a row, so a thread has every so many-th row.
template <int kThreads>
constexpr int kRowGroups = kThreads / kChunkUnits;
// Rows of a thread, when rows that stay are loaded.
constexpr int kResidentRows = 4;

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
  char* operands;        // the rows that stay
  char* stages;          // chunks of those that do not
  float* inverse_norms;  // of the rows that stay, or kStreamedNorms
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
template <int kAtOnce, int kRows, class T>
__device__ __forceinline__ void fetch(const ImageMetric<T>& m, const int32_t (&token)[kRows], int unit,
                                      Unit<T> (&out)[kRows]) {
  constexpr int kElements = kUnitElements<T>;
  if (m.heads == 1) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) out[i] = load_unit(m, 0, token[i], unit);
    return;
  }
  const float heads = static_cast<float>(m.heads), inverse = 1.0f / heads;
#pragma unroll
  for (int first = 0; first < kRows; first += kAtOnce) {
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

template <class T, int kRows>
__device__ __forceinline__ void add_squares(const Unit<T> (&units)[kRows], float (&squared)[kRows]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int e = 0; e < kUnitElements<T>; ++e) {
      const float v = widen(units[i].element[e]);
      squared[i] += v * v;
    }
  }
}

// The inverse norm of a row from its eight lanes' sums of squares, added always in the same order; every lane gets it.
__device__ __forceinline__ float row_inverse_norm(float squared) {
#pragma unroll
  for (int step = kChunkUnits / 2; step > 0; step /= 2) squared += __shfl_xor_sync(kFullWarp, squared, step);
  return inverse_norm(squared);
}

__device__ __forceinline__ void store_unit(char* operands, int row, int pitch, int unit, uint4 word) {
  *reinterpret_cast<uint4*>(operands + row * pitch + unit * kUnitBytes) = word;
}

// Loads rows, given by token_of(row), and their inverse norms into shared memory for the whole kernel. Ends with a
// barrier.
template <int kThreads, class T, class TokenOf>
__device__ __forceinline__ void load_resident(const ImageMetric<T>& m, int rows, TokenOf token_of, const MatchConfig& c,
                                              const TileMemory& memory) {
  constexpr int kGroups = kRowGroups<kThreads>;
  const int group = threadIdx.x / kChunkUnits, lane_unit = threadIdx.x % kChunkUnits;
  for (int start = group; start - group < rows; start += kResidentRows * kGroups) {
    int32_t token[kResidentRows];
#pragma unroll
    for (int i = 0; i < kResidentRows; ++i) {
      const int row = start + i * kGroups;
      token[i] = row < rows ? token_of(row) : -1;
    }
    float squared[kResidentRows] = {};
    for (int unit0 = 0; unit0 < c.row_units; unit0 += kChunkUnits) {
      const int unit = unit0 + lane_unit;
      Unit<T> units[kResidentRows];
      fetch<kResidentRows>(m, token, unit, units);
      add_squares<T>(units, squared);
#pragma unroll
      for (int i = 0; i < kResidentRows; ++i) {
        if (token[i] >= 0 && unit < c.row_units) {
          store_unit(memory.operands, start + i * kGroups, c.pitch, unit, units[i].word);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kResidentRows; ++i) {
      const float inverse = row_inverse_norm(squared[i]);
      if (lane_unit == 0 && token[i] >= 0) memory.inverse_norms[start + i * kGroups] = inverse;
    }
  }
  __syncthreads();
}

}  // namespace tokred::cuda
