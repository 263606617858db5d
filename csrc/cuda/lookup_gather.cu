// SPDX-License-Identifier: MIT
// Lookup attention, gather: a block owns queries and goes through all keys, with the highest score found on the way.
#include "lookup_sweep.cuh"
#include "ops.h"

namespace tokred::cuda {

void lookup_gather(const LookupGatherArgs& args, cudaStream_t stream) {
  SweepArgs a = sweep_args(args, false);
  a.other.second = sweep_rows_of(args, args.v, args.v_strides);
  a.second_sums = args.out, a.row_values = static_cast<float*>(args.lse);
  sweep<Sweep::gather>("lookup_gather", args.dtype, a, stream);
}

}  // namespace tokred::cuda
