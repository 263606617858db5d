// SPDX-License-Identifier: MIT
// Exceptions inside OpenMP regions.
#pragma once

#include <atomic>
#include <exception>

namespace tokred::cpu {
namespace {

// Keeps the first exception that is thrown inside an OpenMP region. One that leaves the region ends the process.
class Failure {
 public:
  template <class Work>
  void guard(const Work& work) noexcept {
    try {
      work();
    } catch (...) {
      if (!failed_.test_and_set()) error_ = std::current_exception();
    }
  }

  // To be called after the region.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
};

}  // namespace
}  // namespace tokred::cpu
