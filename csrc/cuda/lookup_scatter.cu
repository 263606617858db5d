// SPDX-License-Identifier: MIT
// Lookup attention, scatter: a block owns lookup tokens and goes through all queries, weights made anew.
#include "lookup_sweep.cuh"
#include "ops.h"

namespace tokred::cuda {

void lookup_scatter(const LookupScatterArgs& args, cudaStream_t stream) {
  SweepArgs a = sweep_args(args, true);
  a.other.second = sweep_rows_of(args, args.v, args.v_strides);
  a.lse = static_cast<const float*>(args.lse), a.second_sums = args.out;
  sweep<Sweep::scatter>("lookup_scatter", args.dtype, a, stream);
}

}  // namespace tokred::cuda
