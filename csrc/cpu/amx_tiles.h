// SPDX-License-Identifier: MIT
// Products of bfloat16 in AMX tiles, sums in float32: some four times the rate of vectors.
// A product is out (rows, columns) = a (rows, steps) b (steps, columns). a lies in rows; b in panels of kTileColumns
// columns, where a word has two steps of a column: (panel, pair of steps, column).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "element.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

constexpr int kTileRows = 16, kTileColumns = 16;
constexpr int kTileSteps = 32;                                 // of one tile
constexpr int64_t kTileWords = kTileSteps / 2 * kTileColumns;  // of b

// Gives this thread its tiles, all of full size, as long as it lives.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = kTileColumns * sizeof(float);
      shape.rows[tile] = kTileRows;
    }
    // GCC's intrinsics are silent about the memory that they read and write.
    asm volatile("" ::"m"(shape) : "memory");
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Tile numbers must be constants: 0 to 3 sum, 4 and 5 hold rows of a, 6 and 7 panels of b.
template <bool kAdds, bool kTwoRows, bool kTwoPanels>
inline void multiply_amx_tile(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t panel_words,
                              int64_t steps, float* out, int64_t out_stride) {
  const int64_t a_bytes = a_stride * sizeof(*a), out_bytes = out_stride * sizeof(float);
  float *right = out + kTileColumns, *below = out + kTileRows * out_stride, *across = below + kTileColumns;
  if constexpr (kAdds) {
    _tile_loadd(0, out, out_bytes);
    if constexpr (kTwoPanels) _tile_loadd(1, right, out_bytes);
    if constexpr (kTwoRows) _tile_loadd(2, below, out_bytes);
    if constexpr (kTwoRows && kTwoPanels) _tile_loadd(3, across, out_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoPanels) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoPanels) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; step += kTileSteps, b += kTileWords) {
    _tile_loadd(4, a + step, a_bytes);
    _tile_loadd(6, b, kTileColumns * sizeof(*b));
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoPanels) {
      _tile_loadd(7, b + panel_words, kTileColumns * sizeof(*b));
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a + kTileRows * a_stride + step, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoPanels) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (kTwoPanels) _tile_stored(1, right, out_bytes);
  if constexpr (kTwoRows) _tile_stored(2, below, out_bytes);
  if constexpr (kTwoRows && kTwoPanels) _tile_stored(3, across, out_bytes);
}

// out (rows, columns) = a (rows, steps) b (steps, columns), or with kAdds += it: whole tiles of all three, so that
// `rows` is a multiple of kTileRows, `columns` of kTileColumns, and `steps` of kTileSteps. Needs Tiles.
template <bool kAdds = false>
inline void multiply_amx(const BFloat16* a, int64_t a_stride, int64_t rows, const uint32_t* b, int64_t steps,
                         int64_t columns, float* out, int64_t out_stride) {
  const int64_t panel_words = steps / 2 * kTileColumns;
  asm volatile("" ::: "memory");  // what is read has been written
  for (int64_t column = 0; column < columns; column += 2 * kTileColumns) {
    const uint32_t* panel = b + column / kTileColumns * panel_words;
    const bool two_panels = column + kTileColumns < columns;
    for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
      const bool two_rows = row + kTileRows < rows;
      const auto multiply =
          two_rows     ? two_panels ? multiply_amx_tile<kAdds, true, true> : multiply_amx_tile<kAdds, true, false>
          : two_panels ? multiply_amx_tile<kAdds, false, true>
                       : multiply_amx_tile<kAdds, false, false>;
      multiply(a + row * a_stride, a_stride, panel, panel_words, steps, out + row * out_stride + column, out_stride);
    }
  }
  asm volatile("" ::: "memory");  // what was written may be read
}

// `count` values from `from` on, zeros behind the last.
inline __m512i load_steps(const BFloat16* from, int64_t count) {
  const __mmask32 present = count >= kTileSteps ? ~__mmask32{0} : (__mmask32{1} << std::max<int64_t>(count, 0)) - 1;
  return _mm512_maskz_loadu_epi16(present, from);
}

// Rows (n, d) at a stride, as rows of `padded` values, zeros behind the d and behind the n up to `rows`.
inline void pack_amx_rows(const BFloat16* from, int64_t stride, int64_t n, int64_t d, int64_t rows, int64_t padded,
                          BFloat16* to) {
  for (int64_t i = 0; i < rows; ++i, to += padded) {
    for (int64_t c = 0; c < padded; c += kTileSteps) {
      _mm512_store_si512(to + c, i < n ? load_steps(from + i * stride + c, d - c) : _mm512_setzero_si512());
    }
  }
}

// Transposes 16 vectors of 16 words: vector i gets word i of every row.
inline void transpose_words(__m512i (&v)[16]) {
  __m512i w[16];
  for (int i = 0; i < 16; i += 2) {
    w[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    w[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(w[i], w[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(w[i], w[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(w[i + 1], w[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(w[i + 1], w[i + 3]);
  }
  // v[4 g + j] has, in its quarter q, word 4 q + j of rows 4 g to 4 g + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i low01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x44),
                  high01 = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xee);
    w[j] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    w[4 + j] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    w[8 + j] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    w[12 + j] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  for (int i = 0; i < 16; ++i) v[i] = w[i];
}

// Rows (n, d) at a stride as the panels of their transpose: `columns` rows are its columns, zeros behind the n.
inline void pack_amx_transposed(const BFloat16* from, int64_t stride, int64_t n, int64_t d, int64_t columns,
                                uint32_t* to) {
  for (int64_t first = 0; first < columns; first += kTileColumns) {
    for (int64_t c = 0; c < d; c += kTileSteps, to += kTileWords) {
      __m512i rows[kTileColumns];
      for (int64_t i = 0; i < kTileColumns; ++i) {
        rows[i] = first + i < n ? load_steps(from + (first + i) * stride + c, d - c) : _mm512_setzero_si512();
      }
      transpose_words(rows);
      for (int i = 0; i < kTileColumns; ++i) _mm512_store_si512(to + i * kTileColumns, rows[i]);
    }
  }
}

// Writes rows (n, d) with a stride as columns: output row c gets value c of each row, then zeros up to `rows`, which is
// a multiple of kTileSteps and the stride of the output. The channels are padded to whole tiles of steps.
inline void pack_amx_columns(const BFloat16* from, int64_t stride, int64_t n, int64_t d, int64_t rows, BFloat16* to) {
  alignas(64) uint16_t evens[32], odds[32];
  for (int i = 0; i < 32; ++i) evens[i] = 2 * i, odds[i] = 2 * i + 1;
  const __m512i even = _mm512_load_si512(evens), odd = _mm512_load_si512(odds);
  for (int64_t first = 0; first < rows; first += kTileSteps) {
    for (int64_t c = 0; c < d; c += kTileSteps) {
      __m512i halves[2][16];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 16; ++i) {
          const int64_t row = first + 16 * half + i;
          halves[half][i] = row < n ? load_steps(from + row * stride + c, d - c) : _mm512_setzero_si512();
        }
        transpose_words(halves[half]);
      }
      for (int i = 0; i < 16; ++i) {
        BFloat16* column = to + (c + 2 * i) * rows + first;
        _mm512_store_si512(column, _mm512_permutex2var_epi16(halves[0][i], even, halves[1][i]));
        _mm512_store_si512(column + rows, _mm512_permutex2var_epi16(halves[0][i], odd, halves[1][i]));
      }
    }
  }
}

// Rows (n, d) at a stride as the panels of themselves: `steps` rows are its steps, zeros behind the n.
inline void pack_amx_panels(const BFloat16* from, int64_t stride, int64_t n, int64_t d, int64_t steps, uint32_t* to) {
  const int64_t panel_words = steps / 2 * kTileColumns;
  // Indices that interleave the values of two rows: the first half, and the second half.
  alignas(64) uint16_t first_half[32], second_half[32];
  for (int i = 0; i < 16; ++i) {
    first_half[2 * i] = i, first_half[2 * i + 1] = 32 + i;
    second_half[2 * i] = 16 + i, second_half[2 * i + 1] = 48 + i;
  }
  const __m512i low = _mm512_load_si512(first_half), high = _mm512_load_si512(second_half);
  for (int64_t step = 0; step < steps; step += 2) {
    const BFloat16* row = from + step * stride;
    for (int64_t c = 0; c < d; c += 2 * kTileColumns) {
      const __m512i even = step < n ? load_steps(row + c, d - c) : _mm512_setzero_si512();
      const __m512i odd = step + 1 < n ? load_steps(row + stride + c, d - c) : _mm512_setzero_si512();
      uint32_t* word = to + c / kTileColumns * panel_words + step / 2 * kTileColumns;
      _mm512_store_si512(word, _mm512_permutex2var_epi16(even, low, odd));
      if (c + kTileColumns < d) _mm512_store_si512(word + panel_words, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}

// Rows of floats (n, columns), rounded, as the panels of themselves: `steps` rows are its steps, zeros behind the n.
inline void round_amx_panels(const float* from, int64_t n, int64_t columns, int64_t steps, uint32_t* to) {
  alignas(64) uint16_t side_by_side[32];
  for (int i = 0; i < 16; ++i) side_by_side[2 * i] = i, side_by_side[2 * i + 1] = 16 + i;
  const __m512i interleave = _mm512_load_si512(side_by_side);
  for (int64_t step = 0; step < steps; step += 2) {
    for (int64_t c = 0; c < columns; c += kTileColumns) {
      const __m512 even = step < n ? _mm512_load_ps(from + step * columns + c) : _mm512_setzero_ps();
      const __m512 odd = step + 1 < n ? _mm512_load_ps(from + (step + 1) * columns + c) : _mm512_setzero_ps();
      const __m512i pairs = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
      _mm512_store_si512(to + c / kTileColumns * (steps / 2 * kTileColumns) + step / 2 * kTileColumns, pairs);
    }
  }
}

// Floats (count, a multiple of 16) rounded to bfloat16.
inline void round_amx(const float* from, int64_t count, BFloat16* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(from + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + i), rounded);
  }
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
