// SPDX-License-Identifier: MIT
// The Python module: raw pointers as integers in, structs out. Python (backends/native/) has checked shapes, dtypes and
// devices; nothing here sees torch, so one build serves every torch version.
#include "bindings.h"

#include <string>

#include "cpu/ops.h"
#ifdef TOKRED_WITH_CUDA
#include "cuda/ops.h"
#endif

namespace py = pybind11;
using tokred::DType;
using tokred::Reduce;
using tokred::bindings::Address;
using tokred::bindings::pointer;
using tokred::bindings::Reader;

namespace {

struct Cpu {
  static std::size_t match_workspace_bytes(const tokred::MatchArgs&) { return 0; }
  static std::size_t rank_candidates_workspace_bytes(const tokred::BestMatchArgs&) { return 0; }
  TOKRED_CPU_OP(bipartite_match, MatchArgs)
  TOKRED_CPU_OP(rank_candidates, BestMatchArgs)
  TOKRED_CPU_OP(build_match_map, MatchMapArgs)
  TOKRED_CPU_OP(count_above_threshold, SimilarCountArgs)
  TOKRED_CPU_OP(window_similarity, WindowSimilarityArgs)
  TOKRED_CPU_OP(window_map, WindowMapArgs)
  TOKRED_CPU_OP(to_csr, ToCsrArgs)
  TOKRED_CPU_OP(compose, ComposeArgs)
  TOKRED_CPU_OP(merge, MergeArgs)
  TOKRED_CPU_OP(merge_backward, MergeBackwardArgs)
  TOKRED_CPU_OP(unmerge, UnmergeArgs)
  TOKRED_CPU_OP(keep_topk, KeepTopkArgs)
};

#ifdef TOKRED_WITH_CUDA
struct Cuda {
  static cudaStream_t on(Address stream) { return pointer<CUstream_st>(stream); }
  static std::size_t match_workspace_bytes(const tokred::MatchArgs& a) {
    return tokred::cuda::match_workspace_bytes(a);
  }
  static std::size_t rank_candidates_workspace_bytes(const tokred::BestMatchArgs& a) {
    return tokred::cuda::rank_candidates_workspace_bytes(a);
  }
  static void bipartite_match(const tokred::MatchArgs& a, Address s) { tokred::cuda::bipartite_match(a, on(s)); }
  static void rank_candidates(const tokred::BestMatchArgs& a, Address s) { tokred::cuda::rank_candidates(a, on(s)); }
  static void build_match_map(const tokred::MatchMapArgs& a, Address s) { tokred::cuda::build_match_map(a, on(s)); }
  static void count_above_threshold(const tokred::SimilarCountArgs& a, Address s) {
    tokred::cuda::count_above_threshold(a, on(s));
  }
  static void window_similarity(const tokred::WindowSimilarityArgs& a, Address s) {
    tokred::cuda::window_similarity(a, on(s));
  }
  static void window_map(const tokred::WindowMapArgs& a, Address s) { tokred::cuda::window_map(a, on(s)); }
  static void to_csr(const tokred::ToCsrArgs& a, Address s) { tokred::cuda::to_csr(a, on(s)); }
  static void compose(const tokred::ComposeArgs& a, Address s) { tokred::cuda::compose(a, on(s)); }
  static void merge(const tokred::MergeArgs& a, Address s) { tokred::cuda::merge(a, on(s)); }
  static void merge_backward(const tokred::MergeBackwardArgs& a, Address s) { tokred::cuda::merge_backward(a, on(s)); }
  static void unmerge(const tokred::UnmergeArgs& a, Address s) { tokred::cuda::unmerge(a, on(s)); }
  static void keep_topk(const tokred::KeepTopkArgs& a, Address s) { tokred::cuda::keep_topk(a, on(s)); }
};
#endif

tokred::Partition partition(Reader& r) {
  tokred::Partition p{};
  p.sources = r.address<int32_t>();
  p.destinations = r.address<int32_t>();
  p.first = r.small(), p.stride = r.small(), p.num_src = r.small(), p.num_dst = r.small();
  p.protected_src = r.small(), p.protected_dst = r.small(), p.sources_by_index = r.small(), p.r = r.small();
  return p;
}

tokred::Windows windows(const py::tuple& values) {
  Reader r(values);
  tokred::Windows w{};
  w.first = r.small(), w.grid_height = r.small(), w.grid_width = r.small();
  w.height = r.small(), w.width = r.small();
  return w;
}

template <class Args>
Args match_args(const py::tuple& values) {
  Reader r(values);
  Args a{};
  a.metric = r.address();
  a.stride_b = r.number(), a.stride_h = r.number(), a.stride_n = r.number();
  a.images = r.number(), a.heads = r.number(), a.tokens = r.number(), a.channels = r.number();
  a.dtype = static_cast<DType>(r.small());
  a.starts = r.address<int32_t>();
  a.partition = partition(r);
  return a;
}

// Every op of one device, under the name it has in Python. The last argument is the CUDA stream (0 on the CPU).
// A problem comes as one tuple, read while the GIL is held; the work itself is done without it.
template <class Device>
void bind_ops(py::module_ m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("match_workspace_bytes",
        [](const py::tuple& problem) { return Device::match_workspace_bytes(match_args<tokred::MatchArgs>(problem)); });
  m.def("rank_candidates_workspace_bytes", [](const py::tuple& problem) {
    return Device::rank_candidates_workspace_bytes(match_args<tokred::BestMatchArgs>(problem));
  });
  m.def("bipartite_match", [](const py::tuple& problem, Address dest, Address members, Address begin, Address count,
                              Address workspace, Address stream) {
    auto a = match_args<tokred::MatchArgs>(problem);
    a.dest = pointer<int32_t>(dest), a.members = pointer<int32_t>(members);
    a.begin = pointer<int32_t>(begin), a.count = pointer<int32_t>(count);
    a.workspace = pointer(workspace);
    py::gil_scoped_release without_gil;
    Device::bipartite_match(a, stream);
  });
  m.def("rank_candidates",
        [](const py::tuple& problem, Address score, Address partner, Address rank, Address workspace, Address stream) {
          auto a = match_args<tokred::BestMatchArgs>(problem);
          a.score = pointer<float>(score), a.partner = pointer<int32_t>(partner), a.rank = pointer<int32_t>(rank);
          a.workspace = pointer(workspace);
          py::gil_scoped_release without_gil;
          Device::rank_candidates(a, stream);
        });
  m.def("build_match_map", [](const py::tuple& partition_values, Address partner, Address rank, int64_t images,
                              int64_t tokens, Address counts, Address starts_in, Address starts_out, int64_t num_out,
                              Address dest, Address members, Address begin, Address count, Address stream) {
    Reader r(partition_values);
    tokred::MatchMapArgs a{};
    a.partition = partition(r);
    a.partner = pointer<int32_t>(partner), a.rank = pointer<int32_t>(rank);
    a.images = images, a.tokens = tokens, a.num_out = num_out;
    a.counts = pointer<int32_t>(counts);
    a.starts_in = pointer<int32_t>(starts_in), a.starts_out = pointer<int32_t>(starts_out);
    a.dest = pointer<int32_t>(dest), a.members = pointer<int32_t>(members);
    a.begin = pointer<int32_t>(begin), a.count = pointer<int32_t>(count);
    py::gil_scoped_release without_gil;
    Device::build_match_map(a, stream);
  });
  m.def(
      "count_above_threshold",
      [](Address score, int64_t images, int64_t sources, double threshold, double divisor, int32_t own, Address moments,
         Address counts, Address stream) {
        Device::count_above_threshold({pointer<float>(score), images, sources, threshold, divisor, own,
                                       pointer<double>(moments), pointer<int32_t>(counts)},
                                      stream);
      },
      release());
  m.def("window_similarity",
        [](const py::tuple& window_values, Address x, int64_t stride_b, int64_t stride_n, int64_t images,
           int64_t channels, int dtype, float threshold, Address score, Address counts, Address stream) {
          tokred::WindowSimilarityArgs a{};
          a.windows = windows(window_values);
          a.x = pointer(x), a.stride_b = stride_b, a.stride_n = stride_n;
          a.images = images, a.channels = channels;
          a.dtype = static_cast<DType>(dtype), a.threshold = threshold;
          a.score = pointer<float>(score), a.counts = pointer<int32_t>(counts);
          py::gil_scoped_release without_gil;
          Device::window_similarity(a, stream);
        });
  m.def("window_map",
        [](const py::tuple& window_values, Address score, int64_t images, int32_t r, Address counts, Address starts_out,
           Address dest, Address members, Address begin, Address count, int64_t num_slots, Address stream) {
          tokred::WindowMapArgs a{};
          a.windows = windows(window_values);
          a.score = pointer<float>(score), a.images = images, a.r = r;
          a.counts = pointer<int32_t>(counts), a.starts_out = pointer<int32_t>(starts_out);
          a.dest = pointer<int32_t>(dest), a.members = pointer<int32_t>(members);
          a.begin = pointer<int32_t>(begin), a.count = pointer<int32_t>(count);
          a.num_slots = num_slots;
          py::gil_scoped_release without_gil;
          Device::window_map(a, stream);
        });
  m.def(
      "to_csr",
      [](Address dest, int64_t images, int64_t tokens, int64_t num_out, Address members, Address begin, Address count,
         Address stream) {
        Device::to_csr({pointer<int32_t>(dest), images, tokens, num_out, pointer<int32_t>(members),
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
         Address weight_sum, int64_t rows_out, int64_t channels, int dtype, int reduce, int64_t rows_in,
         int64_t num_members, Address stream) {
        tokred::MergeArgs a{};
        a.x = pointer(x), a.x_stride = x_stride, a.weight = pointer(weight);
        a.members = pointer<int32_t>(members), a.begin = pointer<int32_t>(begin), a.count = pointer<int32_t>(count);
        a.y = pointer(y), a.weight_sum = pointer(weight_sum);
        a.rows_out = rows_out, a.channels = channels;
        a.dtype = static_cast<DType>(dtype), a.reduce = static_cast<Reduce>(reduce);
        a.rows_in = rows_in, a.num_members = num_members;
        Device::merge(a, stream);
      },
      release());
  m.def(
      "merge_backward",
      [](Address grad_y, Address grad_weight_sum, Address x, int64_t x_stride, Address y, Address weight,
         Address weight_sum, Address dest, Address members, Address begin, Address count, Address grad_x,
         Address grad_weight, int64_t images, int64_t tokens, int64_t num_out, int64_t channels, int dtype, int reduce,
         int64_t num_members, Address stream) {
        tokred::MergeBackwardArgs a{};
        a.grad_y = pointer(grad_y), a.grad_weight_sum = pointer(grad_weight_sum);
        a.x = pointer(x), a.x_stride = x_stride, a.y = pointer(y);
        a.weight = pointer(weight), a.weight_sum = pointer(weight_sum);
        a.dest = pointer<int32_t>(dest), a.members = pointer<int32_t>(members);
        a.begin = pointer<int32_t>(begin), a.count = pointer<int32_t>(count);
        a.grad_x = pointer(grad_x), a.grad_weight = pointer(grad_weight);
        a.images = images, a.tokens = tokens, a.num_out = num_out, a.channels = channels;
        a.dtype = static_cast<DType>(dtype), a.reduce = static_cast<Reduce>(reduce), a.num_members = num_members;
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
  m.def(
      "keep_topk",
      [](Address score, int64_t stride, int64_t images, int64_t tokens, int32_t first, int32_t k, int32_t fuse,
         Address dest, Address members, Address begin, Address count, Address stream) {
        Device::keep_topk({pointer<float>(score), stride, images, tokens, first, k, fuse, pointer<int32_t>(dest),
                           pointer<int32_t>(members), pointer<int32_t>(begin), pointer<int32_t>(count)},
                          stream);
      },
      release());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of tokred_kernels; use the package, not this module.";
  auto cpu = m.def_submodule("cpu");
  bind_ops<Cpu>(cpu);
  tokred::bindings::bind_attention(cpu);
  tokred::bindings::bind_lookup(cpu);
  cpu.def("instruction_set", &tokred::cpu::instruction_set);
  cpu.def("use_large_pages",
          [](Address data, std::size_t bytes) { tokred::cpu::use_large_pages(reinterpret_cast<void*>(data), bytes); });
#ifdef TOKRED_WITH_CUDA
  auto cuda = m.def_submodule("cuda");
  bind_ops<Cuda>(cuda);
  tokred::bindings::bind_lookup_cuda(cuda);
  cuda.def("why_unusable", [] { return tokred::cuda::why_unusable(TOKRED_CUDA_ARCHITECTURES); });
  m.attr("cuda_architectures") = std::string(TOKRED_CUDA_ARCHITECTURES);
#else
  m.attr("cuda_architectures") = std::string();
#endif
}
