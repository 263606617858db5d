// SPDX-License-Identifier: MIT
// csrc/cuda/ptx.cuh for the host. Which lane holds which element of a matrix is as the PTX ISA's figures give it for
// ldmatrix, mma.m16n8k16 (16-bit elements) and mma.m16n8k8 (TF32).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <array>
#include <cmath>
#include <cstdint>

namespace tokred::cuda {

inline char* dynamic_shared() { return emulation::device().shared; }

inline void load_matrices(const char* row, uint32_t (&words)[4]) {
  using Words = std::array<uint32_t, 4>;
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::Device::fail("ldmatrix needs rows on 16 bytes");
  const Words got =
      emulation::exchange<const char*, Words>(emulation::kFullWarp, row, [](const char* const* rows, int lane) {
        Words out;
        for (int matrix = 0; matrix < 4; ++matrix) {
          std::memcpy(&out[matrix], rows[8 * matrix + lane / 4] + lane % 4 * 4, sizeof(uint32_t));
        }
        return out;
      });
  for (int k = 0; k < 4; ++k) words[k] = got[k];
}

// What a lane brings to a product.
struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};

// Round toward zero. The PTX ISA leaves open how the tensor cores round their sums, and
// they are known to cut them off (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021).
inline float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(double{nearest}) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// c += a b for a 16 x depth and a depth x 8 matrix; a_element(all, row, k) and b_element(all, k, column) find the rest.
template <int kDepth, class A, class B>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, A a_element, B b_element) {
  using Out = std::array<float, 4>;
  const Fragments own{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  const Out out = emulation::exchange<Fragments, Out>(emulation::kFullWarp, own, [&](const Fragments* all, int lane) {
    Out result;
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += double{a_element(all, row, k)} * b_element(all, k, column);
      result[i] = toward_zero(all[lane].c[i] + sum);
    }
    return result;
  });
  for (int i = 0; i < 4; ++i) c[i] = out[i];
}

template <class ToFloat>
void multiply_halves(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ToFloat to_float) {
  auto half_of = [to_float](uint32_t word, int which) { return to_float(static_cast<uint16_t>(word >> 16 * which)); };
  multiply_fragments<16>(
      c, a, b0, b1,
      [=](const Fragments* all, int row, int k) {
        return half_of(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2);
      },
      [=](const Fragments* all, int k, int column) { return half_of(all[column * 4 + k % 8 / 2].b[k / 8], k % 2); });
}

inline void mma_step(__nv_bfloat16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_halves(c, a, b0, b1, [](uint16_t bits) { return __bfloat162float({bits}); });
}

inline void mma_step(__half, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_halves(c, a, b0, b1, [](uint16_t bits) {
    __half value;
    std::memcpy(&value, &bits, sizeof value);
    return __half2float(value);
  });
}

// The 13 bits that TF32 lacks; the tensor cores do not look at them.
constexpr uint32_t kTf32Unused = 0x1fff;

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto value = [](uint32_t bits) { return __uint_as_float(bits & ~kTf32Unused); };
  multiply_fragments<8>(
      c, a, b0, b1,
      [=](const Fragments* all, int row, int k) { return value(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]); },
      [=](const Fragments* all, int k, int column) { return value(all[column * 4 + k % 4].b[k / 4]); });
}

// To the nearest, ties away from zero.
inline uint32_t round_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (!std::isfinite(value)) return bits;
  return (bits + (kTf32Unused + 1) / 2) & ~kTf32Unused;
}

}  // namespace tokred::cuda
