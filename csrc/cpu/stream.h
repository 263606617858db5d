// SPDX-License-Identifier: MIT
// Stores that bypass the caches, for results larger than the caches: a plain store fetches each line before it
// overwrites it.
#pragma once

#include "isa.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Results from this size on do not stay in the second-level caches anyway.
constexpr int64_t kStreamBytes = 8 << 20;

inline void stream_vector(FloatVector value, float* to) {
#if defined(__AVX512F__)
  __builtin_ia32_movntps512(to, value);
#elif defined(__AVX__)
  __builtin_ia32_movntps256(to, value);
#elif defined(__SSE__)
  __builtin_ia32_movntps(to, value);
#else
  *reinterpret_cast<FloatVector*>(to) = value;
#endif
}

// Streamed stores are in no order with others until this.
inline void stream_end() {
#if defined(__SSE__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
