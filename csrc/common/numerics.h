// SPDX-License-Identifier: MIT
// Numeric conventions that every backend shares; see backends/reference for the same in torch.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define TOKRED_HD __host__ __device__ __forceinline__
#else
#define TOKRED_HD inline
#endif

namespace tokred {

// A squared norm below this counts as zero, and its token has similarity 0 to all others: far below anything a
// network makes, far enough above the smallest normal float that the products with the inverse stay normal.
constexpr float kMinSquaredNorm = 1e-30f;

// 1 / |v| from |v|^2; 0 for a zero vector. Infinity gives 0, NaN stays NaN.
TOKRED_HD float inverse_norm(float squared_norm) {
  return squared_norm < kMinSquaredNorm ? 0.0f : 1.0f / sqrtf(squared_norm);
}

}  // namespace tokred
