// SPDX-License-Identifier: MIT
// The gradients of lookup attention's scatter: one kernel that owns queries, one that owns keys, and no sum is split.
#include "lookup_sweep.cuh"
#include "ops.h"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "lookup_scatter_backward";

}  // namespace

void lookup_scatter_backward(const LookupScatterBackwardArgs& args, cudaStream_t stream) {
  const SweepRows grads = sweep_rows_of(args, args.grad_out, args.grad_out_strides);
  const SweepRows values = sweep_rows_of(args, args.v, args.v_strides);
  for (bool keys : {false, true}) {
    SweepArgs a = sweep_args(args, keys);
    (keys ? a.own : a.other).second = grads, (keys ? a.other : a.own).second = values;
    a.lse = static_cast<const float*>(args.lse);
    if (keys) {
      a.first_sums = args.grad_k;
      sweep<Sweep::scatter_keys>(kName, args.dtype, a, stream);
    } else {
      a.first_sums = args.grad_q, a.second_sums = args.grad_v;
      a.row_values = static_cast<float*>(args.grad_lse);
      sweep<Sweep::scatter_queries>(kName, args.dtype, a, stream);
    }
  }
}

}  // namespace tokred::cuda
