// SPDX-License-Identifier: MIT
// What differs between the copies of a kernel that CMake compiles, one per instruction set.
#pragma once

#include <cstdint>

#ifndef TOKRED_ISA
#error "compile kernels with -DTOKRED_ISA=<name>; see CMakeLists.txt"
#endif

// Opens the namespace of this copy. Everything a kernel defines lies in it or has internal linkage, so that the linker
// never takes a function compiled for a wider instruction set in place of a narrower one.
#define TOKRED_KERNELS_BEGIN namespace tokred::cpu::TOKRED_ISA {
#define TOKRED_KERNELS_END }

namespace tokred::cpu::TOKRED_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using FloatVector __attribute__((vector_size(kLanes * 4))) = float;
using IndexVector __attribute__((vector_size(kLanes * 4))) = int32_t;

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
