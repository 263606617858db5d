// SPDX-License-Identifier: MIT
// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "isa.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Memory, aligned for the vectors, grown and never shrunk: one per thread, so that calls do not allocate.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      data_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
