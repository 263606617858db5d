// SPDX-License-Identifier: MIT
// Token attention and lookup attention in the Python module.
#include "bindings.h"
#include "cpu/ops.h"
#ifdef TOKRED_WITH_CUDA
#include "cuda/ops.h"
#endif

namespace tokred::bindings {
namespace {

struct Cpu {
  TOKRED_CPU_OP(token_attention, TokenAttentionArgs)
  TOKRED_CPU_OP(token_attention_backward, TokenAttentionBackwardArgs)
  TOKRED_CPU_OP(lookup_gather, LookupGatherArgs)
  TOKRED_CPU_OP(lookup_gather_backward, LookupGatherBackwardArgs)
  TOKRED_CPU_OP(lookup_scatter, LookupScatterArgs)
  TOKRED_CPU_OP(lookup_scatter_backward, LookupScatterBackwardArgs)
};

#ifdef TOKRED_WITH_CUDA
struct Cuda {
  static cudaStream_t on(Address stream) { return pointer<CUstream_st>(stream); }
  static void lookup_gather(const LookupGatherArgs& a, Address s) { cuda::lookup_gather(a, on(s)); }
  static void lookup_gather_backward(const LookupGatherBackwardArgs& a, Address s) {
    cuda::lookup_gather_backward(a, on(s));
  }
  static void lookup_scatter(const LookupScatterArgs& a, Address s) { cuda::lookup_scatter(a, on(s)); }
  static void lookup_scatter_backward(const LookupScatterBackwardArgs& a, Address s) {
    cuda::lookup_scatter_backward(a, on(s));
  }
};
#endif

template <class Args>
Args attention_args(const py::tuple& values, double scale) {
  Reader r(values);
  Args a{};
  a.q = r.address(), a.k = r.address(), a.v = r.address();
  for (auto* strides : {a.q_strides, a.k_strides, a.v_strides}) {
    for (int i = 0; i < 3; ++i) strides[i] = r.number();
  }
  a.images = r.number(), a.heads = r.number(), a.tokens = r.number(), a.channels = r.number();
  a.dtype = static_cast<DType>(r.small());
  a.bias = r.address(), a.policy = r.address(), a.starts = r.address<int32_t>();
  a.importance = static_cast<Importance>(r.small());
  a.row_max = r.address(), a.row_sum = r.address();
  a.scale = scale;
  return a;
}

}  // namespace

void bind_attention(py::module_ m) {
  m.def("token_attention",
        [](const py::tuple& problem, double scale, Address out, Address partial, Address importance, Address stream) {
          auto a = attention_args<TokenAttentionArgs>(problem, scale);
          a.out = pointer(out), a.partial = pointer(partial), a.importance_out = pointer(importance);
          py::gil_scoped_release without_gil;
          Cpu::token_attention(a, stream);
        });
  m.def("token_attention_backward",
        [](const py::tuple& problem, double scale, Address grad_out, const py::tuple& grad_strides,
           Address grad_importance, Address grad_q, Address grad_k, Address grad_v, Address grad_bias,
           Address grad_policy, Address stream) {
          auto a = attention_args<TokenAttentionBackwardArgs>(problem, scale);
          Reader r(grad_strides);
          a.grad_out = pointer(grad_out);
          for (auto& stride : a.grad_out_strides) stride = r.number();
          a.grad_importance = pointer(grad_importance);
          a.grad_q = pointer(grad_q), a.grad_k = pointer(grad_k), a.grad_v = pointer(grad_v);
          a.grad_bias = pointer(grad_bias), a.grad_policy = pointer(grad_policy);
          py::gil_scoped_release without_gil;
          Cpu::token_attention_backward(a, stream);
        });
}

namespace {

// Where a tensor starts, and its strides of image, head and token.
void read_strided(Reader& r, const void*& data, int64_t (&strides)[3]) {
  data = r.address();
  for (auto& stride : strides) stride = r.number();
}

void read_strided(const py::tuple& values, const void*& data, int64_t (&strides)[3]) {
  Reader r(values);
  read_strided(r, data, strides);
}

template <class Args>
Args lookup_args(const py::tuple& values, double scale) {
  Reader r(values);
  Args a{};
  read_strided(r, a.q, a.q_strides), read_strided(r, a.k, a.k_strides);
  a.images = r.number(), a.heads = r.number(), a.compressed = r.number(), a.tokens = r.number();
  a.channels = r.number(), a.dtype = static_cast<DType>(r.small());
  a.scale = scale;
  return a;
}

// The ops of one device; the last argument is the CUDA stream (0 on the CPU).
template <class Device>
void bind_lookup_ops(py::module_ m) {
  m.def("lookup_gather",
        [](const py::tuple& problem, double scale, const py::tuple& v, Address out, Address lse, Address stream) {
          auto a = lookup_args<LookupGatherArgs>(problem, scale);
          read_strided(v, a.v, a.v_strides);
          a.out = pointer(out), a.lse = pointer(lse);
          py::gil_scoped_release without_gil;
          Device::lookup_gather(a, stream);
        });
  m.def("lookup_gather_backward",
        [](const py::tuple& problem, double scale, const py::tuple& v, const py::tuple& grad_out, Address grad_lse,
           Address out, Address lse, Address grad_q, Address grad_k, Address grad_v, const py::object& scatter_v,
           const py::object& scatter_grad, Address stream) {
          auto a = lookup_args<LookupGatherBackwardArgs>(problem, scale);
          read_strided(v, a.v, a.v_strides), read_strided(grad_out, a.grad_out, a.grad_out_strides);
          a.grad_lse = pointer(grad_lse), a.out = pointer(out), a.lse = pointer(lse);
          a.grad_q = pointer(grad_q), a.grad_k = pointer(grad_k), a.grad_v = pointer(grad_v);
          if (!scatter_v.is_none()) {
            read_strided(scatter_v.cast<py::tuple>(), a.scatter_v, a.scatter_v_strides);
            read_strided(scatter_grad.cast<py::tuple>(), a.scatter_grad, a.scatter_grad_strides);
          }
          py::gil_scoped_release without_gil;
          Device::lookup_gather_backward(a, stream);
        });
  m.def("lookup_scatter",
        [](const py::tuple& problem, double scale, const py::tuple& v, Address lse, Address out, Address stream) {
          auto a = lookup_args<LookupScatterArgs>(problem, scale);
          read_strided(v, a.v, a.v_strides);
          a.lse = pointer(lse), a.out = pointer(out);
          py::gil_scoped_release without_gil;
          Device::lookup_scatter(a, stream);
        });
  m.def("lookup_scatter_backward",
        [](const py::tuple& problem, double scale, const py::tuple& v, const py::tuple& grad_out, Address lse,
           Address grad_q, Address grad_k, Address grad_v, Address grad_lse, Address stream) {
          auto a = lookup_args<LookupScatterBackwardArgs>(problem, scale);
          read_strided(v, a.v, a.v_strides), read_strided(grad_out, a.grad_out, a.grad_out_strides);
          a.lse = pointer(lse);
          a.grad_q = pointer(grad_q), a.grad_k = pointer(grad_k), a.grad_v = pointer(grad_v);
          a.grad_lse = pointer(grad_lse);
          py::gil_scoped_release without_gil;
          Device::lookup_scatter_backward(a, stream);
        });
}

}  // namespace

void bind_lookup(py::module_ m) { bind_lookup_ops<Cpu>(m); }

#ifdef TOKRED_WITH_CUDA
void bind_lookup_cuda(py::module_ m) { bind_lookup_ops<Cuda>(m); }
#endif

}  // namespace tokred::bindings
