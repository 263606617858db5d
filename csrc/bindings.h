// SPDX-License-Identifier: MIT
// What the files of the Python module share: addresses, reading tuples, and errors that name the op.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <string>

namespace tokred::bindings {

namespace py = pybind11;

using Address = std::uintptr_t;  // 0 stands for "not given"

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Runs a CPU op. What it throws becomes Python's RuntimeError, with the name of the op.
template <class Op>
void run_named(const char* op, const Op& run) {
  const auto fail = [op](const std::string& reason) {
    throw std::runtime_error(std::string("tokred_kernels.") + op + ": " + reason);
  };
  try {
    run();
  } catch (const std::bad_alloc&) {
    fail("out of memory: the CPU kernel could not allocate its scratch memory");
  } catch (const std::runtime_error& error) {
    fail(error.what());
  }
}

// A CPU op as the bindings call it: with an unused stream.
#define TOKRED_CPU_OP(op, Args)                                    \
  static void op(const tokred::Args& a, Address) {                 \
    tokred::bindings::run_named(#op, [&] { tokred::cpu::op(a); }); \
  }

// Takes a tuple of whole numbers apart, in order.
class Reader {
 public:
  explicit Reader(const py::tuple& values) : values_(values) {}
  int64_t number() { return values_[next_++].cast<int64_t>(); }
  int32_t small() { return static_cast<int32_t>(number()); }
  template <class T = void>
  T* address() {
    return pointer<T>(static_cast<Address>(number()));
  }

 private:
  const py::tuple& values_;
  std::size_t next_ = 0;
};

// Attention's ops, which are in a file of their own. On a GPU token attention is Triton's.
void bind_attention(py::module_ cpu);
void bind_lookup(py::module_ cpu);
void bind_lookup_cuda(py::module_ cuda);

}  // namespace tokred::bindings
