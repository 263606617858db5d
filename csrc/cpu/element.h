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

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Element {  // float and double are their own accumulators
  using Sum = T;
  static Sum load(T value) { return value; }
  static T store(Sum value) { return value; }
};

template <>
struct Element<_Float16> {
  using Sum = float;
  static Sum load(_Float16 value) { return static_cast<float>(value); }
  static _Float16 store(Sum value) { return static_cast<_Float16>(value); }
};

template <>
struct Element<BFloat16> {
  using Sum = float;
  static Sum load(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
  static BFloat16 store(Sum value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
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
      return function(_Float16{});
    case DType::bf16:
      return function(BFloat16{});
    case DType::f64:
      return function(double{});
  }
  throw std::invalid_argument("tokred_kernels: unknown dtype code");
}

// Below this much data a second thread costs more than it saves.
constexpr int64_t kSerialBytes = 100 * 1024;

// Channels that are summed at a time, so that the sums stay in registers and the first-level cache.
constexpr int64_t kChannelBlock = 256;

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
