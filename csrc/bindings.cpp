// SPDX-License-Identifier: MIT
// The Python module: raw pointers as integers in, structs out. Python (backends/native/) has checked shapes, dtypes and
// devices; nothing here sees torch, so one build serves every torch version.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "cpu/ops.h"
#ifdef TOKRED_WITH_CUDA
#include "cuda/ops.h"
#endif

namespace py = pybind11;
using tokred::DType;
using tokred::Reduce;

namespace {

using Address = std::uintptr_t;  // 0 stands for "not given"

template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

struct Cpu {
  static std::size_t match_workspace_bytes(const tokred::MatchArgs&) { return 0; }
  static void bipartite_match(const tokred::MatchArgs& a, Address) { tokred::cpu::bipartite_match(a); }
  static void invert(const tokred::InvertArgs& a, Address) { tokred::cpu::invert(a); }
  static void compose(const tokred::ComposeArgs& a, Address) { tokred::cpu::compose(a); }
  static void merge(const tokred::MergeArgs& a, Address) { tokred::cpu::merge(a); }
  static void merge_backward(const tokred::MergeBackwardArgs& a, Address) { tokred::cpu::merge_backward(a); }
  static void unmerge(const tokred::UnmergeArgs& a, Address) { tokred::cpu::unmerge(a); }
};

#ifdef TOKRED_WITH_CUDA
struct Cuda {
  static cudaStream_t on(Address stream) { return pointer<CUstream_st>(stream); }
  static std::size_t match_workspace_bytes(const tokred::MatchArgs& a) {
    return tokred::cuda::match_workspace_bytes(a);
  }
  static void bipartite_match(const tokred::MatchArgs& a, Address s) { tokred::cuda::bipartite_match(a, on(s)); }
  static void invert(const tokred::InvertArgs& a, Address s) { tokred::cuda::invert(a, on(s)); }
  static void compose(const tokred::ComposeArgs& a, Address s) { tokred::cuda::compose(a, on(s)); }
  static void merge(const tokred::MergeArgs& a, Address s) { tokred::cuda::merge(a, on(s)); }
  static void merge_backward(const tokred::MergeBackwardArgs& a, Address s) { tokred::cuda::merge_backward(a, on(s)); }
  static void unmerge(const tokred::UnmergeArgs& a, Address s) { tokred::cuda::unmerge(a, on(s)); }
};
#endif

tokred::MatchArgs match_args(Address metric, int64_t stride_b, int64_t stride_h, int64_t stride_n, int64_t images,
                             int64_t heads, int64_t tokens, int64_t channels, int dtype, Address sources,
                             Address destinations, int32_t first, int32_t stride, int32_t num_src, int32_t num_dst,
                             int32_t protected_src, int32_t protected_dst, int32_t sources_by_index, int32_t r) {
  tokred::MatchArgs a{};
  a.metric = pointer(metric);
  a.stride_b = stride_b, a.stride_h = stride_h, a.stride_n = stride_n;
  a.images = images, a.heads = heads, a.tokens = tokens, a.channels = channels;
  a.dtype = static_cast<DType>(dtype);
  a.partition = {pointer<int32_t>(sources),
                 pointer<int32_t>(destinations),
                 first,
                 stride,
                 num_src,
                 num_dst,
                 protected_src,
                 protected_dst,
                 sources_by_index,
                 r};
  return a;
}

// Every op of one device, under the name it has in Python. The last argument is the CUDA stream (0 on the CPU).
template <class Device>
void bind_ops(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "match_workspace_bytes", [](Address metric, int64_t stride_b, int64_t stride_h, int64_t stride_n, int64_t images,
                                  int64_t heads, int64_t tokens, int64_t channels, int dtype, Address sources,
                                  Address destinations, int32_t first, int32_t stride, int32_t num_src, int32_t num_dst,
                                  int32_t protected_src, int32_t protected_dst, int32_t sources_by_index, int32_t r) {
        return Device::match_workspace_bytes(match_args(metric, stride_b, stride_h, stride_n, images, heads, tokens,
                                                        channels, dtype, sources, destinations, first, stride, num_src,
                                                        num_dst, protected_src, protected_dst, sources_by_index, r));
      });
  m.def(
      "bipartite_match",
      [](Address metric, int64_t stride_b, int64_t stride_h, int64_t stride_n, int64_t images, int64_t heads,
         int64_t tokens, int64_t channels, int dtype, Address sources, Address destinations, int32_t first,
         int32_t stride, int32_t num_src, int32_t num_dst, int32_t protected_src, int32_t protected_dst,
         int32_t sources_by_index, int32_t r, Address dest, Address members, Address begin, Address count,
         Address workspace, Address stream) {
        auto a = match_args(metric, stride_b, stride_h, stride_n, images, heads, tokens, channels, dtype, sources,
                            destinations, first, stride, num_src, num_dst, protected_src, protected_dst,
                            sources_by_index, r);
        a.dest = pointer<int32_t>(dest);
        a.members = pointer<int32_t>(members);
        a.begin = pointer<int32_t>(begin);
        a.count = pointer<int32_t>(count);
        a.workspace = pointer(workspace);
        Device::bipartite_match(a, stream);
      },
      release());
  m.def(
      "invert",
      [](Address dest, int64_t images, int64_t tokens, int64_t num_out, Address members, Address begin, Address count,
         Address stream) {
        Device::invert({pointer<int32_t>(dest), images, tokens, num_out, pointer<int32_t>(members),
                        pointer<int32_t>(begin), pointer<int32_t>(count)},
                       stream);
      },
      release());
  m.def(
      "compose",
      [](Address first, Address second, int64_t images, int64_t tokens, int64_t middle, Address dest, Address stream) {
        Device::compose(
            {pointer<int32_t>(first), pointer<int32_t>(second), images, tokens, middle, pointer<int32_t>(dest)},
            stream);
      },
      release());
  m.def(
      "merge",
      [](Address x, int64_t x_stride, Address weight, Address members, Address begin, Address count, Address y,
         Address weight_sum, int64_t rows_out, int64_t channels, int dtype, int reduce, Address stream) {
        tokred::MergeArgs a{};
        a.x = pointer(x), a.x_stride = x_stride, a.weight = pointer(weight);
        a.members = pointer<int32_t>(members), a.begin = pointer<int32_t>(begin), a.count = pointer<int32_t>(count);
        a.y = pointer(y), a.weight_sum = pointer(weight_sum);
        a.rows_out = rows_out, a.channels = channels;
        a.dtype = static_cast<DType>(dtype), a.reduce = static_cast<Reduce>(reduce);
        Device::merge(a, stream);
      },
      release());
  m.def(
      "merge_backward",
      [](Address grad_y, Address grad_weight_sum, Address x, int64_t x_stride, Address y, Address weight,
         Address weight_sum, Address dest, Address members, Address begin, Address count, Address grad_x,
         Address grad_weight, int64_t images, int64_t tokens, int64_t num_out, int64_t channels, int dtype, int reduce,
         Address stream) {
        tokred::MergeBackwardArgs a{};
        a.grad_y = pointer(grad_y), a.grad_weight_sum = pointer(grad_weight_sum);
        a.x = pointer(x), a.x_stride = x_stride, a.y = pointer(y);
        a.weight = pointer(weight), a.weight_sum = pointer(weight_sum);
        a.dest = pointer<int32_t>(dest), a.members = pointer<int32_t>(members);
        a.begin = pointer<int32_t>(begin), a.count = pointer<int32_t>(count);
        a.grad_x = pointer(grad_x), a.grad_weight = pointer(grad_weight);
        a.images = images, a.tokens = tokens, a.num_out = num_out, a.channels = channels;
        a.dtype = static_cast<DType>(dtype), a.reduce = static_cast<Reduce>(reduce);
        Device::merge_backward(a, stream);
      },
      release());
  m.def(
      "unmerge",
      [](Address y, int64_t y_stride, Address dest, Address x, int64_t images, int64_t tokens, int64_t num_out,
         int64_t channels, int dtype, Address stream) {
        Device::unmerge({pointer(y), y_stride, pointer<int32_t>(dest), pointer(x), images, tokens, num_out, channels,
                         static_cast<DType>(dtype)},
                        stream);
      },
      release());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of tokred_kernels; use the package, not this module.";
  auto cpu = m.def_submodule("cpu");
  bind_ops<Cpu>(cpu);
  cpu.def("instruction_set", &tokred::cpu::instruction_set);
#ifdef TOKRED_WITH_CUDA
  bind_ops<Cuda>(m.def_submodule("cuda"));
  m.attr("cuda_architectures") = std::string(TOKRED_CUDA_ARCHITECTURES);
#else
  m.attr("cuda_architectures") = std::string();
#endif
}
