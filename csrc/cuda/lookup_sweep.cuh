// SPDX-License-Identifier: MIT
// The kernel of all sweeps, and its launch.
#pragma once

#include <string>

#include "lookup.cuh"
#include "row_copy.cuh"

namespace tokred::cuda {

template <class T, Sweep kSweep, int kWidth>
__global__ void __launch_bounds__(kSweepThreads, sweep_blocks(kSweep, kWidth))
    sweep_rows(const __grid_constant__ SweepArgs a) {
  using Tile = SweepTile<kWidth>;
  constexpr bool kSlopes = has_slopes(kSweep), kSecond = sums_second(kSweep), kKeys = owns_keys(kSweep);
  constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns;
  constexpr int kProductRows = Tile::kProductRows, kProductColumns = Tile::kProductColumns;
  const SweepShared<kSweep, kWidth> shared(reinterpret_cast<float*>(dynamic_shared()));
  const SweepPlace place(a, kRows);
  const int64_t queries = kKeys ? a.other.rows : a.own.rows;
  const int own = min(kRows, a.own.rows - place.first), channels = a.channels;

  load_tile<T, kRows, kWidth>(place.row<T>(a.own.first, place.first), a.own.first, own, channels, shared.own_first);
  if constexpr (kSlopes) {
    load_tile<T, kRows, kWidth>(place.row<T>(a.own.second, place.first), a.own.second, own, channels,
                                shared.own_second);
  }
  if constexpr (kSweep == Sweep::gather_queries) {
    load_offsets<T, kRows>(a, place, a.own.second, queries, place.first, own, shared.own_values);
  }

  // This thread's products: rows side by side, columns apart.
  const int column = threadIdx.x % Tile::kProductsAcross, row = threadIdx.x / Tile::kProductsAcross * kProductRows;
  float highest[kProductRows], lse[kProductRows], total[kProductRows];
#pragma unroll
  for (int i = 0; i < kProductRows; ++i) {
    highest[i] = -INFINITY, total[i] = 0;
    lse[i] = !kKeys && kSlopes && row + i < own ? a.lse[place.pair * queries + place.first + row + i] : 0.0f;
  }
  SweepSums<kWidth> first_sums, second_sums;
  first_sums.clear(), second_sums.clear();

  for (int32_t start = 0; start < a.other.rows; start += kColumns) {
    const int columns = min(kColumns, a.other.rows - start);
    if (start > 0) __syncthreads();
    load_tile<T, kColumns, kWidth>(place.row<T>(a.other.first, start), a.other.first, columns, channels,
                                   shared.other_first);
    load_tile<T, kColumns, kWidth>(place.row<T>(a.other.second, start), a.other.second, columns, channels,
                                   shared.other_second);
    if constexpr (kKeys) {
      if (threadIdx.x < kColumns) {
        const int at = threadIdx.x;
        shared.other_lse[at] = at < columns ? a.lse[place.pair * queries + start + at] : 0.0f;
      }
    }
    if constexpr (kSweep == Sweep::gather_keys) {
      load_offsets<T, kColumns>(a, place, a.other.second, queries, start, columns, shared.other_offsets);
    }
    __syncthreads();

    float weight[kProductRows][kProductColumns] = {}, slope[kProductRows][kProductColumns] = {};
#pragma unroll 2
    for (int c = 0; c < channels; c += kQuad) {
      const int x = row * Tile::kStride + c, y = column * Tile::kStride + c;
      add_products<kWidth>(shared.own_first + x, shared.other_first + y, weight);
      if constexpr (kSlopes) add_products<kWidth>(shared.own_second + x, shared.other_second + y, slope);
    }
#pragma unroll
    for (int i = 0; i < kProductRows; ++i) {
      float from = lse[i];
      if constexpr (kSweep == Sweep::gather) {
        float top = highest[i];
#pragma unroll
        for (int j = 0; j < kProductColumns; ++j) {
          const float score = weight[i][j] * a.scale;
          if (column + j * Tile::kProductsAcross < columns && score > top) top = score;
        }
#pragma unroll
        for (int step = 1; step < Tile::kProductsAcross; step *= 2) {
          const float other = __shfl_xor_sync(kFullWarp, top, step);
          top = other > top ? other : top;
        }
        const float shrink = expf(highest[i] - top);
        if (column == 0) shared.own_values[row + i] = shrink;
        total[i] *= shrink;
        highest[i] = from = top;
      }
#pragma unroll
      for (int j = 0; j < kProductColumns; ++j) {
        const int at = column + j * Tile::kProductsAcross;
        if constexpr (kKeys) from = shared.other_lse[at];
        const float value = at < columns ? expf(weight[i][j] * a.scale - from) : 0.0f;
        weight[i][j] = value;
        if constexpr (kSweep == Sweep::gather_queries) slope[i][j] += shared.own_values[row + i];
        if constexpr (kSweep == Sweep::gather_keys) slope[i][j] += shared.other_offsets[at];
        slope[i][j] *= value;
        if constexpr (kSweep == Sweep::gather) total[i] += value;
        if constexpr (kSweep == Sweep::scatter_queries) total[i] -= slope[i][j];
      }
    }
#pragma unroll
    for (int j = 0; j < kProductColumns; ++j) {
      Vector<float, kProductRows> weights, slopes;
#pragma unroll
      for (int i = 0; i < kProductRows; ++i) weights.element[i] = weight[i][j], slopes.element[i] = slope[i][j];
      const int at = (column + j * Tile::kProductsAcross) * Tile::kWeightStride + row;
      if constexpr (kSecond) write_floats(shared.weights + at, weights);
      if constexpr (kSlopes) write_floats(shared.slopes + at, slopes);
    }
    __syncthreads();

    if constexpr (kSweep == Sweep::gather) second_sums.shrink(shared.own_values);
#pragma unroll 2
    for (int c = 0; c < columns; ++c) {
      const int weights = c * Tile::kWeightStride, vector = c * Tile::kStride;
      if constexpr (kSlopes) first_sums.add(shared.slopes + weights, shared.other_first + vector);
      if constexpr (kSecond) second_sums.add(shared.weights + weights, shared.other_second + vector);
    }
  }

  if constexpr (kSweep == Sweep::gather || kSweep == Sweep::scatter_queries) {
    if constexpr (kSweep == Sweep::gather) __syncthreads();  // own_values have been read
#pragma unroll
    for (int i = 0; i < kProductRows; ++i) {
#pragma unroll
      for (int step = 1; step < Tile::kProductsAcross; step *= 2) {
        total[i] += __shfl_xor_sync(kFullWarp, total[i], step);
      }
      if (column != 0) continue;
      float value = total[i];
      if constexpr (kSweep == Sweep::gather) {
        shared.own_values[row + i] = 1 / total[i];
        value = highest[i] + logf(total[i]);
      }
      if (row + i < own) a.row_values[place.pair * a.own.rows + place.first + row + i] = value;
    }
  }
  if constexpr (kSweep == Sweep::gather) {
    __syncthreads();
    second_sums.shrink(shared.own_values);
  }
  if constexpr (kSlopes) first_sums.template store<T>(a, place, a.scale, a.first_sums);
  if constexpr (kSecond) second_sums.template store<T>(a, place, 1.0f, a.second_sums);
}

inline SweepRows sweep_rows_of(const LookupProblem& p, const void* data, const int64_t (&strides)[3]) {
  SweepRows rows{data, {strides[0], strides[1], strides[2]}, false};
  const int bytes = element_bytes(p.dtype);
  const uintptr_t all = static_cast<uintptr_t>(strides[0] | strides[1] | strides[2] | p.channels) * bytes;
  rows.whole = (address(data) | all) % kUnitBytes == 0;
  return rows;
}

// What all sweeps of a problem have; the side of the queries is `own` but where a sweep owns keys.
inline SweepArgs sweep_args(const LookupProblem& p, bool keys) {
  SweepArgs a{};
  SweepSide& queries = keys ? a.other : a.own;
  queries.first = sweep_rows_of(p, p.q, p.q_strides), queries.rows = static_cast<int32_t>(p.compressed);
  SweepSide& tokens = keys ? a.own : a.other;
  tokens.first = sweep_rows_of(p, p.k, p.k_strides), tokens.rows = static_cast<int32_t>(p.tokens);
  a.images = p.images, a.heads = p.heads, a.channels = static_cast<int32_t>(p.channels);
  a.scale = static_cast<float>(p.scale);
  return a;
}

// Calls f with the least width that holds so many channels, as a constant.
template <class F>
void with_sweep_width(const char* op, int32_t channels, F&& f) {
  if (channels <= 32) return f(std::integral_constant<int, 32>{});
  if (channels <= 64) return f(std::integral_constant<int, 64>{});
  if (channels <= 128) return f(std::integral_constant<int, 128>{});
  if (channels <= kMostWidth) return f(std::integral_constant<int, kMostWidth>{});
  throw std::invalid_argument("tokred_kernels." + std::string(op) + ": q must have at most " +
                              std::to_string(kMostWidth) + " channels a head, which is the most that cuda kernels " +
                              "take (use the backend \"cpu\" or \"reference\"), got " + std::to_string(channels));
}

template <Sweep kSweep>
void sweep(const char* op, DType dtype, SweepArgs a, cudaStream_t stream) {
  with_type<false>(op, dtype, [&](auto zero) {
    with_sweep_width(op, a.channels, [&](auto width) {
      if (a.images == 0 || a.heads == 0) return;
      a.tiles = static_cast<int32_t>(divide_up(a.own.rows, SweepTile<width>::kRows));
      launch(op, sweep_rows<decltype(zero), kSweep, width>, a.images * a.heads * a.tiles, kSweepThreads,
             SweepShared<kSweep, width>::kFloats * static_cast<int>(sizeof(float)), stream, a);
    });
  });
}

}  // namespace tokred::cuda
