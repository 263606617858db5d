// SPDX-License-Identifier: MIT
// How many scores reach a threshold: a few sums in double, the same for every instruction set.
#include <cmath>
#include <limits>

#include "for_each.h"
#include "ops.h"

namespace tokred::cpu {
namespace {

// With fewer scores than this in total, a second thread takes longer than it saves.
constexpr int64_t kSerialScores = 16 * 1024;
constexpr float kAbsent = -std::numeric_limits<float>::infinity();

struct Moments {
  double mean, deviation;
};

// The moments of the scores above -infinity. With fewer than two, the deviation or the mean is NaN.
Moments moments(const float* score, int64_t sources) {
  double sum = 0, number = 0;
#pragma omp simd reduction(+ : sum, number)
  for (int64_t i = 0; i < sources; ++i) {
    const bool present = score[i] > kAbsent;
    sum += present ? score[i] : 0.0f;
    number += present;
  }
  const double mean = sum / number;
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < sources; ++i) {
    const double off = score[i] > kAbsent ? score[i] - mean : 0.0;
    squares += off * off;
  }
  return {mean, std::sqrt(squares / (number - 1))};
}

template <class Threshold>
int32_t count_at_least(const float* score, int64_t sources, Threshold threshold) {
  int32_t number = 0;
#pragma omp simd reduction(+ : number)
  for (int64_t i = 0; i < sources; ++i) number += (score[i] > kAbsent) & (score[i] >= threshold);
  return number;
}

}  // namespace

void count_above_threshold(const SimilarCountArgs& a) {
  const bool parallel = a.images * a.sources > kSerialScores;
  Moments shared{};
  if (a.divisor != 0 && !a.own) {
    for (int64_t b = 0; b < a.images; ++b) {
      const Moments one = moments(a.score + b * a.sources, a.sources);
      shared.mean += one.mean, shared.deviation += one.deviation;
    }
    shared.mean /= a.images, shared.deviation /= a.images;
  }
  for_each(a.images, parallel, [&](int64_t b) {
    const float* score = a.score + b * a.sources;
    if (a.divisor == 0) {
      a.counts[b] = count_at_least(score, a.sources, static_cast<float>(a.threshold));
    } else {
      const Moments m = a.own ? moments(score, a.sources) : shared;
      a.counts[b] = count_at_least(score, a.sources, m.mean + m.deviation / a.divisor);
    }
  });
}

}  // namespace tokred::cpu
