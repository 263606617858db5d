// SPDX-License-Identifier: MIT
// Counts the scores of each image that reach a threshold, with one block for an image. One launch, or two if the
// threshold is the average over all images.
#include <cmath>

#include "block_scan.cuh"
#include "launch.h"
#include "ops.h"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "count_above_threshold";
constexpr int kCountThreads = 256;

struct Moments {
  double mean, std;
};

// The moments of the scores above -infinity. The std of a single score is 0 / 0, NaN.
__device__ __forceinline__ Moments image_moments(const float* score, int64_t sources) {
  double sum = 0, number = 0, squares = 0;
  for (int64_t i = threadIdx.x; i < sources; i += kCountThreads) {
    if (score[i] > -INFINITY) sum += score[i], ++number;
  }
  number = block_sum<kCountThreads>(number);
  const double mean = block_sum<kCountThreads>(sum) / number;
  for (int64_t i = threadIdx.x; i < sources; i += kCountThreads) {
    if (score[i] > -INFINITY) squares += (score[i] - mean) * (score[i] - mean);
  }
  return {mean, sqrt(block_sum<kCountThreads>(squares) / (number - 1))};
}

__global__ void __launch_bounds__(kCountThreads) write_moments(const __grid_constant__ SimilarCountArgs args) {
  const int64_t image = blockIdx.x;
  const Moments own = image_moments(args.score + image * args.sources, args.sources);
  if (threadIdx.x == 0) args.moments[2 * image] = own.mean, args.moments[2 * image + 1] = own.std;
}

// Every block sums the moments of all images in the same order, so that all have the same threshold.
__device__ __forceinline__ Moments average_moments(const SimilarCountArgs& args) {
  double mean = 0, std = 0;
  for (int64_t b = threadIdx.x; b < args.images; b += kCountThreads) {
    mean += args.moments[2 * b], std += args.moments[2 * b + 1];
  }
  const double images = static_cast<double>(args.images);
  mean = block_sum<kCountThreads>(mean) / images;
  return {mean, block_sum<kCountThreads>(std) / images};
}

__global__ void __launch_bounds__(kCountThreads) count_similar(const __grid_constant__ SimilarCountArgs args) {
  const int64_t image = blockIdx.x;
  const float* score = args.score + image * args.sources;
  double least = static_cast<float>(args.threshold);
  if (args.divisor != 0) {
    const Moments m = args.own ? image_moments(score, args.sources) : average_moments(args);
    least = m.mean + m.std / args.divisor;
  }
  int32_t count = 0;
  for (int64_t i = threadIdx.x; i < args.sources; i += kCountThreads) {
    count += score[i] > -INFINITY && score[i] >= least;
  }
  count = block_sum<kCountThreads>(count);
  if (threadIdx.x == 0) args.counts[image] = count;
}

}  // namespace

void count_above_threshold(const SimilarCountArgs& args, cudaStream_t stream) {
  if (args.images == 0) return;
  if (args.divisor != 0 && !args.own) launch(kName, write_moments, args.images, kCountThreads, 0, stream, args);
  launch(kName, count_similar, args.images, kCountThreads, 0, stream, args);
}

}  // namespace tokred::cuda
