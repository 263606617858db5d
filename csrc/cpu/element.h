// SPDX-License-Identifier: MIT
// The element types: how each is loaded into the type that sums are kept in, and stored from it.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "../common/args.h"
#include "isa.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

template <class T>
struct Element {  // float and double are their own accumulators
  using Sum = T;
  static Sum load(T value) { return value; }
  static T store(Sum value) { return value; }
};

// By whole numbers, which vectorise on every instruction set and compiler; conversions of _Float16 do not.
template <>
struct Element<Float16> {
  using Sum = float;
  static Sum load(Float16 value) {
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    const int32_t magnitude = value.bits & 0x7fff;
    const uint32_t subnormal = bits_as<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f);
    // The exponent's bias grows by 112; that of infinity and NaN twice, from all ones to all ones.
    const uint32_t bias = (magnitude >= 0x7c00 ? 2u * 112u : 112u) << 23;
    const uint32_t normal = (static_cast<uint32_t>(magnitude) << 13) + bias;
    return bits_as<float>(sign | (magnitude < 0x0400 ? subnormal : normal));
  }
  static Float16 store(Sum value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const int32_t magnitude = bits & 0x7fffffffu;
    // Round to nearest, ties to even: below 2^-14 by an addition at which the last place of a float is 2^-24.
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
    const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t result = magnitude < 0x38800000 ? subnormal : normal;
    result = magnitude >= 0x47800000 ? 0x7c00u : result;
    result = magnitude > 0x7f800000 ? 0x7e00u : result;
    return {static_cast<uint16_t>(((bits >> 16) & 0x8000u) | result)};
  }
};

template <>
struct Element<BFloat16> {
  using Sum = float;
  static Sum load(BFloat16 value) { return bits_as<float>(static_cast<uint32_t>(value.bits) << 16); }
  static BFloat16 store(Sum value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    // Round to nearest, ties to even. A NaN must not be carried into infinity: it becomes the quiet NaN.
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
  }
};

// Calls `function` with a value of the element type that `dtype` names: the one switch over dtypes.
template <class Function>
void with_element(DType dtype, Function&& function) {
  switch (dtype) {
    case DType::f32:
      return function(float{});
    case DType::f16:
      return function(Float16{});
    case DType::bf16:
      return function(BFloat16{});
    case DType::f64:
      return function(double{});
  }
  throw std::invalid_argument("tokred_kernels: unknown dtype code");
}

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Below this much data a second thread costs more than it saves.
constexpr int64_t kSerialBytes = 100 * 1024;

// Channels that are summed at a time, so that the sums stay in registers and the first-level cache.
constexpr int64_t kChannelBlock = 256;

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
