// SPDX-License-Identifier: MIT
// The pieces of attention on the CPU: operands packed for the vector units, products of small blocks kept in registers,
// and the exponential. A block of queries has its whole row of scores at hand, N floats, so no weights are stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "element.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

template <class Sum>
struct Simd {
  static constexpr int kWidth = kLanes * 4 / static_cast<int>(sizeof(Sum));
  typedef Sum Vector __attribute__((vector_size(kLanes * 4)));
};

// Queries whose scores are at hand together: a multiple of the rows of both register tiles below.
constexpr int kQueryBlock = 48;
// Register tiles: rows times vectors. With 32 registers 24 hold sums, with 16 registers 12 do.
constexpr int kPanelRows = kLanes == 16 ? 8 : 4;
constexpr int kPanels = 3;
constexpr int kRowRows = kLanes == 16 ? 6 : 3;
constexpr int kRowVectors = 4;
// As an argument: how many rows a tile has, or vectors side by side.
template <int kNumber>
using Number = std::integral_constant<int, kNumber>;
static_assert(kQueryBlock % kPanelRows == 0 && kQueryBlock % kRowRows == 0, "blocks must be made of whole tiles");

// Memory for the vectors, one per thread, grown and never shrunk, so that calls do not allocate.
class Arena {
 public:
  template <class Sum>
  Sum* take(int64_t values) {
    const std::size_t bytes = static_cast<std::size_t>(values) * sizeof(Sum);
    if (bytes > size_) {
      data_.reset(static_cast<char*>(::operator new(bytes, kAlignment)));
      size_ = bytes;
    }
    return reinterpret_cast<Sum*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(char* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<char, Free> data_;
  std::size_t size_ = 0;
};

template <class Sum>
void clear(Sum* values, int64_t number) {
  std::fill(values, values + number, Sum{});
}

// Rows of `padded` sums times `factor` to rows of results a stride apart.
template <class T, class Sum>
void store_rows(const Sum* from, int64_t padded, int64_t count, int64_t channels, Sum factor, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i, from += padded, to += stride) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) to[c] = Element<T>::store(from[c] * factor);
  }
}

// Rows (n, d) of T at a stride, as rows of `padded` sums, zeros behind the d and behind the n up to `rows`.
template <class T, class Sum>
void pack_rows(const T* from, int64_t stride, int64_t n, int64_t d, int64_t rows, int64_t padded, Sum* to) {
  for (int64_t i = 0; i < rows; ++i) {
    Sum* row = to + i * padded;
    if (i < n) {
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) row[c] = Element<T>::load(from[i * stride + c]);
    }
    for (int64_t c = i < n ? d : 0; c < padded; ++c) row[c] = 0;
  }
}

// Rows (n, padded) as panels of kWidth of them, (panel, d, lane), zeros behind the n: what a product with rows of d
// reads one vector after the other.
template <class Sum>
void pack_panels(const Sum* rows, int64_t n, int64_t d, int64_t padded, Sum* to) {
  constexpr int kWidth = Simd<Sum>::kWidth;
  for (int64_t first = 0; first < n; first += kWidth) {
    Sum* panel = to + first * d;
    const int64_t lanes = std::min<int64_t>(kWidth, n - first);
    for (int64_t c = 0; c < d; ++c) {
      for (int64_t l = 0; l < lanes; ++l) panel[c * kWidth + l] = rows[(first + l) * padded + c];
      for (int64_t l = lanes; l < kWidth; ++l) panel[c * kWidth + l] = 0;
    }
  }
}

// What one step of a tile multiplies: a factor of each row, found so, with vectors that lie `vector_stride` apart.
enum class Factors {
  by_row,   // (rows, steps): a row's factors side by side
  by_step,  // (steps, rows): those of a step side by side
};

// out (kRows, kVectors) = the sum over steps of factor times vector, in registers; with kAdds, added to out.
template <class Sum, int kRows, int kVectors, Factors kFactors, bool kAdds>
inline void multiply_tile(const Sum* factors, int64_t factor_stride, const Sum* vectors, int64_t step_stride,
                          int64_t vector_stride, int64_t steps, Sum* out, int64_t out_stride) {
  using Vector = typename Simd<Sum>::Vector;
  constexpr int kWidth = Simd<Sum>::kWidth;
  Vector sum[kRows][kVectors] = {};
  if constexpr (kAdds) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] = *reinterpret_cast<Vector*>(out + m * out_stride + v * kWidth);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    Vector b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      b[v] = *reinterpret_cast<const Vector*>(vectors + step * step_stride + v * vector_stride);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const Sum a = factors[kFactors == Factors::by_row ? m * factor_stride + step : step * factor_stride + m];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += a * b[v];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) *reinterpret_cast<Vector*>(out + m * out_stride + v * kWidth) = sum[m][v];
  }
}

// out (count, n) = rows (count, d) panels^T, n a multiple of kWidth. As many rows are
// read and written as whole tiles of either kind have.
template <class Sum>
void multiply_panels(const Sum* rows, int64_t padded, const Sum* panels, int64_t d, int64_t n, Sum* out,
                     int64_t count) {
  constexpr int kWidth = Simd<Sum>::kWidth;
  int64_t j = 0;
  const auto columns = [&](auto tile_rows, auto vectors) {
    for (int64_t m = 0; m < count; m += tile_rows) {
      multiply_tile<Sum, tile_rows, vectors, Factors::by_row, false>(rows + m * padded, padded, panels + j * d, kWidth,
                                                                     d * kWidth, d, out + m * n + j, n);
    }
    j += vectors * kWidth;
  };
  // One vector alone is slow: three and one are taken as four.
  if (n / kWidth % kPanels == 1 && n / kWidth >= kRowVectors) columns(Number<kRowRows>{}, Number<kRowVectors>{});
  while (j + kPanels * kWidth <= n) columns(Number<kPanelRows>{}, Number<kPanels>{});
  while (j < n) columns(Number<kPanelRows>{}, Number<1>{});
}

// Calls `columns` with a number of vectors and the column they start at, until `padded` columns are covered.
template <class Sum, class Columns>
void each_row_tile(int64_t padded, const Columns& columns) {
  constexpr int kWidth = Simd<Sum>::kWidth;
  int64_t c = 0;
  for (; c + kRowVectors * kWidth <= padded; c += kRowVectors * kWidth) columns(Number<kRowVectors>{}, c);
  for (; c < padded; c += kWidth) columns(Number<1>{}, c);
}

// out (count, padded) = the first `keys` columns of weights (count, n), times rows (keys, padded). Reads rows of
// weights and writes rows of out in whole tiles.
template <class Sum>
void multiply_rows(const Sum* weights, int64_t n, const Sum* rows, int64_t keys, int64_t padded, Sum* out,
                   int64_t count) {
  each_row_tile<Sum>(padded, [&](auto vectors, int64_t c) {
    for (int64_t m = 0; m < count; m += kRowRows) {
      multiply_tile<Sum, kRowRows, vectors, Factors::by_row, false>(
          weights + m * n, n, rows + c, padded, Simd<Sum>::kWidth, keys, out + m * padded + c, padded);
    }
  });
}

// out (keys rounded up to kRowRows, padded) += weights^T (keys, count) rows (count, padded). Behind the `keys` columns
// weights must be readable up to the next multiple of kRowRows.
template <class Sum>
void add_outer(const Sum* weights, int64_t n, int64_t keys, const Sum* rows, int64_t padded, Sum* out, int64_t count) {
  for (int64_t j = 0; j < keys; j += kRowRows) {
    each_row_tile<Sum>(padded, [&](auto vectors, int64_t c) {
      multiply_tile<Sum, kRowRows, vectors, Factors::by_step, true>(weights + j, n, rows + c, padded, Simd<Sum>::kWidth,
                                                                    count, out + j * padded + c, padded);
    });
  }
}

// e^x within two units in the last place; 0 below -87.7, infinity from 88.4. NaN stays NaN.
inline float exponential(float x) {
  // The whole powers of two nearest to these are -127 and 128, whose bits as below are those of 0 and of infinity.
  constexpr float kLowest = -88.0f, kHighest = 89.0f;
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float low = x < kLowest ? kLowest : x;
  const float clamped = low > kHighest ? kHighest : low;
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
  constexpr float kRound = 12582912.0f;
  const float shifted = clamped * kLog2E + kRound;
  const float whole = shifted - kRound;
  const float r = (clamped - whole * kLn2High) - whole * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;  // the low bits of `shifted` are the whole number
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline double exponential(double x) { return std::exp(x); }

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
