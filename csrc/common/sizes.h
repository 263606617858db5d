// SPDX-License-Identifier: MIT
// Sizes of things, for host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "args.h"

namespace tokred {

constexpr int kLanes = 32;  // threads of a warp

// The widest load or store of a thread, and the unit of a row in shared memory.
constexpr int kUnitBytes = 16;

constexpr std::size_t round_up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }
constexpr int64_t divide_up(int64_t value, int64_t step) { return (value + step - 1) / step; }

inline int element_bytes(DType dtype) {
  switch (dtype) {
    case DType::f16:
    case DType::bf16:
      return 2;
    case DType::f32:
      return 4;
    case DType::f64:
      return 8;
  }
  return 0;
}

}  // namespace tokred
