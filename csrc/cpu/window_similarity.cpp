// SPDX-License-Identifier: MIT
// The mean pairwise cosine of each window, by its sum of unit vectors: x is read from memory once.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/windows.h"
#include "element.h"
#include "for_each.h"
#include "norm.h"
#include "scratch.h"

TOKRED_KERNELS_BEGIN
namespace {

// One thread's rows of C floats: a token where its elements are none, and a window's sum of unit vectors.
struct Rows {
  float* token;
  float* sum;
};

template <class T>
const float* as_floats(const T* values, int64_t channels, float* converted) {
  if constexpr (std::is_same_v<T, float>) {
    return values;
  } else {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) converted[c] = static_cast<float>(Element<T>::load(values[c]));
    return converted;
  }
}

// The window whose first token is at `corner`.
template <class T>
float similarity(const WindowSimilarityArgs& a, const T* corner, const Rows& rows) {
  const Windows& w = a.windows;
  float own = 0;  // the sum of |u_i|^2: 1 for each token that is not zero, up to rounding
  std::fill(rows.sum, rows.sum + a.channels, 0.0f);
  for (int32_t y = 0; y < w.height; ++y) {
    for (int32_t x = 0; x < w.width; ++x) {
      const T* values = corner + (int64_t{y} * w.grid_width + x) * a.stride_n;
      const float* token = as_floats(values, a.channels, rows.token);
      const float squared = squared_norm(token, a.channels);
      const float inverse = inverse_norm(squared);
      if (inverse != 0) own += squared * inverse * inverse;
#pragma omp simd
      for (int64_t c = 0; c < a.channels; ++c) rows.sum[c] += inverse * token[c];
    }
  }
  const float pairs = squared_norm(rows.sum, a.channels) - own;
  const float size = static_cast<float>(window_size(w));
  const float mean = pairs / (size * (size - 1));
  return std::isnan(mean) ? -std::numeric_limits<float>::infinity() : mean;
}

template <class T>
void all_windows(const WindowSimilarityArgs& a) {
  const Windows& w = a.windows;
  const int64_t down = w.grid_height / w.height, across = w.grid_width / w.width;
  const bool parallel = a.images * num_tokens(w) * a.channels * static_cast<int64_t>(sizeof(T)) > kSerialBytes;
  for_each(a.images * down, parallel, [&](int64_t row) {
    thread_local Scratch scratch;
    float* memory = scratch.take(2 * a.channels);
    const Rows rows{memory, memory + a.channels};
    const int64_t b = row / down, y = row % down * w.height;
    const T* first = static_cast<const T*>(a.x) + b * a.stride_b + (w.first + y * w.grid_width) * a.stride_n;
    float* score = a.score + row * across;
    for (int64_t i = 0; i < across; ++i) score[i] = similarity(a, first + i * w.width * a.stride_n, rows);
  });
  for_each(a.images, parallel, [&](int64_t b) {
    const float* score = a.score + b * down * across;
    int32_t number = 0;
#pragma omp simd reduction(+ : number)
    for (int64_t i = 0; i < down * across; ++i) number += score[i] >= a.threshold;
    a.counts[b] = number;
  });
}

}  // namespace

void window_similarity(const WindowSimilarityArgs& a) {
  with_element(a.dtype, [&](auto zero) { all_windows<decltype(zero)>(a); });
}

TOKRED_KERNELS_END
