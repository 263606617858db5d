// SPDX-License-Identifier: MIT
// One head of one image: where its rows are, how they are padded, and one row of weights from its scores.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/args.h"
#include "attention_tiles.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

struct ImageRows {
  int64_t first, count;
  bool packed;
};

template <class Args>
ImageRows image_rows(const Args& a, int64_t image) {
  if (a.starts) return {a.starts[image], a.starts[image + 1] - a.starts[image], true};
  return {image * a.tokens, a.tokens, false};
}

struct HeadShape {
  int64_t tokens, channels;
  int64_t keys;    // tokens, rounded up so that whole vectors and whole tiles cover them
  int64_t padded;  // channels, rounded up to whole vectors
};

template <class Sum, class Args>
HeadShape head_shape(const Args& a, int64_t tokens) {
  constexpr int64_t kWidth = Simd<Sum>::kWidth;
  // A multiple of the width, and room for the last tile of kRowRows keys.
  const int64_t keys = round_up(round_up(tokens, kRowRows), kWidth);
  return {tokens, a.channels, keys, round_up(a.channels, kWidth)};
}

// The first row of a head of an image.
template <class T>
const T* head_rows(const void* data, const int64_t (&strides)[3], const ImageRows& rows, int64_t image, int64_t head) {
  // Packed images have no stride of their own: their rows are counted from the first image's.
  const int64_t start = rows.packed ? rows.first * strides[2] : image * strides[0];
  return static_cast<const T*>(data) + start + head * strides[1];
}

// The bias of each key, -infinity behind the last one, and its policy, 0 there.
template <class Sum, class Args>
void load_key_terms(const Args& a, const ImageRows& rows, const HeadShape& s, Sum* bias, Sum* policy) {
  for (int64_t j = 0; j < s.keys; ++j) {
    const bool present = j < s.tokens;
    bias[j] = !present ? -std::numeric_limits<Sum>::infinity()
              : a.bias ? static_cast<const Sum*>(a.bias)[rows.first + j]
                       : Sum(0);
    policy[j] = !present ? Sum(0) : a.policy ? static_cast<const Sum*>(a.policy)[rows.first + j] : Sum(1);
  }
}

// DynamicViT's, models/dyvit.py: keeps rows whose keys are dropped finite.
constexpr double kPolicyEps = 1e-6;

template <class Sum>
struct RowStatistics {
  Sum highest, sum;  // the highest score, and what the weights are divided by
};

// From products q . k to e_ij = exp(s_ij - max_j s_ij), in place, for the row of `query`.
template <class Sum, class Args>
RowStatistics<Sum> exponentiate(const Args& a, const HeadShape& s, Sum* row, const Sum* bias, const Sum* policy,
                                int64_t query) {
  const Sum scale = static_cast<Sum>(a.scale);
  Sum highest = -std::numeric_limits<Sum>::infinity();
#pragma omp simd reduction(max : highest)
  for (int64_t j = 0; j < s.keys; ++j) {
    row[j] = row[j] * scale + bias[j];
    highest = row[j] > highest ? row[j] : highest;
  }
  Sum sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < s.keys; ++j) {
    row[j] = exponential(row[j] - highest);
    sum += row[j] * policy[j];
  }
  if (a.policy) sum += row[query] * (1 - policy[query]) + static_cast<Sum>(kPolicyEps);
  return {highest, sum};
}

// Turns e_ij into weights in place, up to a factor of the row, which it returns.
template <class Sum, class Args>
Sum weigh(const Args& a, const HeadShape& s, Sum* row, const Sum* policy, int64_t query, Sum sum) {
  if (a.policy) {
    const Sum least = static_cast<Sum>(kPolicyEps) / static_cast<Sum>(s.tokens), own = row[query];
#pragma omp simd
    for (int64_t j = 0; j < s.keys; ++j) row[j] = row[j] * policy[j] + least;
    row[query] = own + least;
  }
  return 1 / sum;
}

// True if a query's weights count for the importance.
inline bool counts(Importance importance, int64_t query, int64_t tokens) {
  return importance == Importance::mean || (importance == Importance::first && query == 0) ||
         (importance == Importance::last && query == tokens - 1);
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
