// SPDX-License-Identifier: MIT
// Copy and clear one row.
#pragma once

#include <cstring>

#include "isa.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// While one row is written, the lines of the next are asked for, to be written in their turn: rows are too short for
// the processor to see that coming, and a line that is not there yet makes its store wait. No prefetch can fault, so
// that it does not matter that the last row has none after it.
inline void copy_row(void* to, const void* from, std::size_t bytes) {
  using Part __attribute__((vector_size(sizeof(FloatVector)), aligned(1), may_alias)) = char;
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  std::size_t done = 0;
  for (; done + sizeof(Part) <= bytes; done += sizeof(Part)) {
    __builtin_prefetch(out + bytes + done, 1);
    *reinterpret_cast<Part*>(out + done) = *reinterpret_cast<const Part*>(in + done);
  }
  if (done < bytes) std::memcpy(out + done, in + done, bytes - done);
}

// std::memset must not get a null pointer, not even for no bytes.
inline void clear_row(void* row, std::size_t bytes) {
  if (bytes > 0) std::memset(row, 0, bytes);
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
