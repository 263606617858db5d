// SPDX-License-Identifier: MIT
// Element types: vectors of them, conversion to the type sums are kept in, and the one switch from DType to a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/args.h"

namespace tokred::cuda {

template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};

template <class T>
using Acc = typename Accumulator<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrow(Acc<T> v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// kElements of T, moved by one instruction. The words are what is loaded and stored.
template <int kBytes>
struct Words;
template <>
struct Words<16> {
  using type = uint4;
};
template <>
struct Words<8> {
  using type = uint2;
};
template <>
struct Words<4> {
  using type = unsigned;
};
template <>
struct Words<2> {
  using type = unsigned short;
};

template <class T, int kElements>
union Vector {
  using Word = typename Words<sizeof(T) * kElements>::type;
  Word word;
  T element[kElements];
  __device__ __forceinline__ Vector() {}
};

// Calls f with a value of the element type; f64 only where the op has it.
template <bool kWithDouble, class F>
void with_type(const char* op, DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f16:
      return f(__half{});
    case DType::bf16:
      return f(__nv_bfloat16{});
    case DType::f64:
      if constexpr (kWithDouble) return f(double{});
      throw std::invalid_argument(std::string(op) + ": float64 is not supported on CUDA; use float32, or the CPU");
  }
  throw std::invalid_argument(std::string(op) + ": unknown dtype");
}

}  // namespace tokred::cuda
