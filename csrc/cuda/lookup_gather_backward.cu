// SPDX-License-Identifier: MIT
// The gradients of lookup attention's gather: one kernel that owns queries, one that owns keys, and no sum is split.
#include "lookup_sweep.cuh"
#include "ops.h"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "lookup_gather_backward";

}  // namespace

void lookup_gather_backward(const LookupGatherBackwardArgs& args, cudaStream_t stream) {
  const SweepRows grads = sweep_rows_of(args, args.grad_out, args.grad_out_strides);
  const SweepRows values = sweep_rows_of(args, args.v, args.v_strides);
  for (bool keys : {false, true}) {
    SweepArgs a = sweep_args(args, keys);
    (keys ? a.own : a.other).second = values, (keys ? a.other : a.own).second = grads;
    a.lse = static_cast<const float*>(args.lse), a.grad_lse = static_cast<const float*>(args.grad_lse);
    a.out = args.out;
    if (keys) {
      a.first_sums = args.grad_k, a.second_sums = args.grad_v;
      sweep<Sweep::gather_keys>(kName, args.dtype, a, stream);
    } else {
      a.first_sums = args.grad_q;
      sweep<Sweep::gather_queries>(kName, args.dtype, a, stream);
    }
  }
}

}  // namespace tokred::cuda
