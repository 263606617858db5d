// SPDX-License-Identifier: MIT
// Launches that more than one op is made of. `op` is the name that their errors bear.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/match_config.h"

namespace tokred::cuda {

// rank_candidates of images too large for one launch: two launches, the candidates in args.workspace. args.score may be
// null.
void tiled_rank_candidates(const char* op, const BestMatchArgs& args, const MatchConfig& c, cudaStream_t stream);

void build_match_map(const char* op, const MatchMapArgs& args, cudaStream_t stream);

}  // namespace tokred::cuda
