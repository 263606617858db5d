// SPDX-License-Identifier: MIT
// Lookup attention on the vector units, forward and backward, as one kernel: a sweep. A block owns a tile of rows of
// one side (compressed or lookup tokens) of a head and goes through all rows of the other side, so every sum is one
// block's, in one order. Products, weights and sums are float.
#pragma once

#include <cmath>
#include <type_traits>

#include "../common/sizes.h"
#include "block_scan.cuh"
#include "dtype.cuh"
#include "launch.h"
#include "ptx.cuh"
#include "units.cuh"

namespace tokred::cuda {

// Every row of a side has a first and a second vector. With s = <first, first of the other side> scale,
// A = e^(s - lse) and t = <second, second of the other side>, the rows that a block owns get
//                    own     first  second   other   first  second   sums over the other side
//   gather           M       q      -        N       k      v        A v, with lse found on the way
//   scatter          N       k      -        M       q      v        A v
//   gather_queries   M       q      g        N       k      v        A (t + offset) k
//   gather_keys      N       k      v        M       q      g        A (t + offset) q, and A g
//   scatter_queries  M       q      v        N       k      g        A t k, and A g, and - A t
//   scatter_keys     N       k      g        M       q      v        A t q
// where g is the gradient of out, and offset_m = grad_lse_m - <g_m, out_m>.
enum class Sweep : int { gather, scatter, gather_queries, gather_keys, scatter_queries, scatter_keys };

constexpr bool owns_keys(Sweep s) { return s == Sweep::scatter || s == Sweep::gather_keys || s == Sweep::scatter_keys; }
constexpr bool has_slopes(Sweep s) { return s != Sweep::gather && s != Sweep::scatter; }
constexpr bool sums_second(Sweep s) { return s != Sweep::gather_queries && s != Sweep::scatter_keys; }
// Blocks that the registers of a multiprocessor must suffice for; two kinds of sums over wide rows take 200.
constexpr int sweep_blocks(Sweep s, int width) {
  if (!has_slopes(s)) return 4;
  return sums_second(s) && width > 64 ? 2 : 3;
}

struct SweepRows {
  const void* data;
  int64_t strides[3];  // of image, head and token
  bool whole;          // all rows start and end at multiples of 16 bytes
};

struct SweepSide {
  SweepRows first, second;
  int32_t rows;
};

struct SweepArgs {
  SweepSide own, other;
  int64_t images, heads;
  int32_t channels, tiles;
  float scale;
  const float* lse;       // (B, H, M)
  const float* grad_lse;  // (B, H, M), or null
  const void* out;        // (B, M, H, d), of the gather whose gradients are taken
  void* first_sums;       // (B, rows, H, d): sums of the other side's first vectors, times scale
  void* second_sums;      // the same of the second ones
  float* row_values;      // (B, H, rows): lse, or grad_lse
};

constexpr int kSweepThreads = 128;
constexpr int kQuad = 4;  // floats of one access to shared memory
constexpr int kMostWidth = 256;

// How a block's rows and the rows of the other side that it has at a time, kWidth channels each, lie in shared memory
// and are shared out to threads: for products 16 threads side by side have a column each, or two, of some rows; for
// sums `kAcross` threads have one or two quads of channels each, of some rows.
template <int kWidth>
struct SweepTile {
  static constexpr int kRows = kWidth <= 128 ? 32 : 16;
  static constexpr int kColumns = kWidth <= 64 ? 32 : 16;
  // Rows lie an odd number of quads apart, so that the quads of eight rows fall into different banks.
  static constexpr int kStride = kWidth + kQuad;
  static constexpr int kWeightStride = kRows + kQuad;
  static constexpr int kProductsAcross = 16;
  static constexpr int kProductRows = kRows * kProductsAcross / kSweepThreads;
  static constexpr int kProductColumns = kColumns / kProductsAcross;
  static constexpr int kQuads = kWidth <= 64 ? 1 : 2;
  static constexpr int kAcross = kWidth / kQuad / kQuads;
  static constexpr int kSumRows = kRows * kAcross / kSweepThreads;
};

template <Sweep kSweep, int kWidth>
struct SweepShared {
  using Tile = SweepTile<kWidth>;
  static constexpr int kOwn = Tile::kRows * Tile::kStride, kOther = Tile::kColumns * Tile::kStride;
  static constexpr int kWeights = Tile::kColumns * Tile::kWeightStride;
  static constexpr int kFloats = (has_slopes(kSweep) ? 2 : 1) * kOwn + 2 * kOther +
                                 (has_slopes(kSweep) + sums_second(kSweep)) * kWeights + Tile::kRows +
                                 2 * Tile::kColumns;
  float *own_first, *own_second, *other_first, *other_second;
  float *slopes, *weights;  // (columns, rows)
  float* own_values;        // by row: what sums shrink by, or offset
  float *other_lse, *other_offsets;

  __device__ __forceinline__ explicit SweepShared(float* at) {
    auto take = [&](int floats) {
      float* taken = at;
      at += floats;
      return taken;
    };
    own_first = take(kOwn), own_second = take(has_slopes(kSweep) ? kOwn : 0);
    other_first = take(kOther), other_second = take(kOther);
    slopes = take(has_slopes(kSweep) ? kWeights : 0), weights = take(sums_second(kSweep) ? kWeights : 0);
    own_values = take(Tile::kRows), other_lse = take(Tile::kColumns), other_offsets = take(Tile::kColumns);
  }
};

template <int kFloats>
__device__ __forceinline__ Vector<float, kFloats> read_floats(const float* from) {
  Vector<float, kFloats> v;
  v.word = *reinterpret_cast<const typename Vector<float, kFloats>::Word*>(from);
  return v;
}

template <int kFloats>
__device__ __forceinline__ void write_floats(float* to, const Vector<float, kFloats>& v) {
  *reinterpret_cast<typename Vector<float, kFloats>::Word*>(to) = v.word;
}

// Where a block is: a head of an image, and the first row that it owns.
struct SweepPlace {
  int64_t image, head, pair;
  int32_t first;

  __device__ __forceinline__ SweepPlace(const SweepArgs& a, int rows) {
    const unsigned block = blockIdx.x, tiles = static_cast<unsigned>(a.tiles);
    pair = block / tiles;
    first = static_cast<int32_t>(block % tiles) * rows;
    image = pair / a.heads, head = pair % a.heads;
  }
  template <class T>
  __device__ __forceinline__ const T* row(const SweepRows& rows, int64_t number) const {
    return static_cast<const T*>(rows.data) + image * rows.strides[0] + head * rows.strides[1] +
           number * rows.strides[2];
  }
  // Where a row of (B, rows, H, d) starts.
  __device__ __forceinline__ int64_t result(const SweepArgs& a, int64_t rows, int64_t number) const {
    return ((image * rows + number) * a.heads + head) * a.channels;
  }
};

// kRows rows of floats, zeros past the channels and past the last row.
template <class T, int kRows, int kWidth>
__device__ __forceinline__ void load_tile(const T* from, const SweepRows& rows, int count, int channels, float* tile) {
  constexpr int kElements = kUnitElements<T>, kUnits = kWidth / kElements;
  auto load = [&](auto whole) {
#pragma unroll(whole ? 4 : 1)
    for (int i = threadIdx.x; i < kRows * kUnits; i += kSweepThreads) {
      const int row = i / kUnits, at = i % kUnits * kElements;
      const Unit<T> v = load_row_unit<whole>(from + row * rows.strides[2] + at, row < count ? channels - at : 0);
#pragma unroll
      for (int e = 0; e < kElements; e += kQuad) {
        Vector<float, kQuad> quad;
#pragma unroll
        for (int k = 0; k < kQuad; ++k) quad.element[k] = widen(v.element[e + k]);
        write_floats(tile + row * SweepTile<kWidth>::kStride + at + e, quad);
      }
    }
  };
  if (rows.whole) {
    load(std::true_type{});
  } else {
    load(std::false_type{});
  }
}

// grad_lse - <g, out> of `count` queries from `query` on, a warp a query, zeros past them. Of all queries there are M.
template <class T, int kRows>
__device__ __forceinline__ void load_offsets(const SweepArgs& a, const SweepPlace& place, const SweepRows& grads,
                                             int64_t queries, int query, int count, float* offsets) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int row = warp; row < kRows; row += kSweepThreads / kLanes) {
    float dot = 0;
    if (row < count) {
      const T* g = place.row<T>(grads, query + row);
      const T* out = static_cast<const T*>(a.out) + place.result(a, queries, query + row);
      for (int c = lane; c < a.channels; c += kLanes) dot += widen(g[c]) * widen(out[c]);
    }
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) dot += __shfl_xor_sync(kFullWarp, dot, step);
    if (lane != 0) continue;
    const float from_lse = row < count && a.grad_lse ? a.grad_lse[place.pair * queries + query + row] : 0.0f;
    offsets[row] = from_lse - dot;
  }
}

// products[i][j] += the four channels of own row i times those of other row j.
template <int kWidth>
__device__ __forceinline__ void add_products(
    const float* own, const float* other,
    float (&products)[SweepTile<kWidth>::kProductRows][SweepTile<kWidth>::kProductColumns]) {
  using Tile = SweepTile<kWidth>;
  Vector<float, kQuad> x[Tile::kProductRows], y[Tile::kProductColumns];
#pragma unroll
  for (int i = 0; i < Tile::kProductRows; ++i) x[i] = read_floats<kQuad>(own + i * Tile::kStride);
#pragma unroll
  for (int j = 0; j < Tile::kProductColumns; ++j) {
    y[j] = read_floats<kQuad>(other + j * Tile::kProductsAcross * Tile::kStride);
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
#pragma unroll
    for (int i = 0; i < Tile::kProductRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kProductColumns; ++j) products[i][j] += x[i].element[k] * y[j].element[k];
    }
  }
}

// A thread's share of the sums that the block's rows get.
template <int kWidth>
struct SweepSums {
  using Tile = SweepTile<kWidth>;
  float value[Tile::kSumRows][Tile::kQuads * kQuad];

  static __device__ __forceinline__ int row() { return threadIdx.x / Tile::kAcross * Tile::kSumRows; }
  static __device__ __forceinline__ int channel() { return threadIdx.x % Tile::kAcross * kQuad; }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < Tile::kSumRows; ++i) {
#pragma unroll
      for (int c = 0; c < Tile::kQuads * kQuad; ++c) value[i][c] = 0;
    }
  }
  __device__ __forceinline__ void shrink(const float* by_row) {
    const auto factor = read_floats<Tile::kSumRows>(by_row + row());
#pragma unroll
    for (int i = 0; i < Tile::kSumRows; ++i) {
#pragma unroll
      for (int c = 0; c < Tile::kQuads * kQuad; ++c) value[i][c] *= factor.element[i];
    }
  }
  // Adds one column: its weight in every row, times its vector.
  __device__ __forceinline__ void add(const float* weights, const float* vector) {
    const auto weight = read_floats<Tile::kSumRows>(weights + row());
#pragma unroll
    for (int q = 0; q < Tile::kQuads; ++q) {
      const auto v = read_floats<kQuad>(vector + channel() + q * Tile::kAcross * kQuad);
#pragma unroll
      for (int i = 0; i < Tile::kSumRows; ++i) {
#pragma unroll
        for (int k = 0; k < kQuad; ++k) value[i][q * kQuad + k] += weight.element[i] * v.element[k];
      }
    }
  }
  template <class T>
  __device__ __forceinline__ void store(const SweepArgs& a, const SweepPlace& place, float factor, void* to) const {
#pragma unroll
    for (int i = 0; i < Tile::kSumRows; ++i) {
      const int32_t number = place.first + row() + i;
      if (number >= a.own.rows) break;
      T* result = static_cast<T*>(to) + place.result(a, a.own.rows, number);
#pragma unroll
      for (int q = 0; q < Tile::kQuads; ++q) {
        const int first = channel() + q * Tile::kAcross * kQuad;
#pragma unroll
        for (int k = 0; k < kQuad; ++k) {
          if (first + k < a.channels) result[first + k] = narrow<T>(value[i][q * kQuad + k] * factor);
        }
      }
    }
  }
};

}  // namespace tokred::cuda
