// SPDX-License-Identifier: MIT
// The CUDA ops. Each launches on the given stream of the current device and does not wait for the result. A failed
// launch throws std::runtime_error with the op's name and CUDA's message.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

#include "../common/args.h"

namespace tokred::cuda {

// Return "" if the current device can run these kernels, else the reason. `architectures` are those of the build.
std::string why_unusable(const std::string& architectures);

// The bytes of device memory that bipartite_match needs as args.workspace; 0 if one launch is enough.
std::size_t match_workspace_bytes(const MatchArgs& args);
void bipartite_match(const MatchArgs& args, cudaStream_t stream);
// The same for rank_candidates.
std::size_t rank_candidates_workspace_bytes(const BestMatchArgs& args);
void rank_candidates(const BestMatchArgs& args, cudaStream_t stream);
void build_match_map(const MatchMapArgs& args, cudaStream_t stream);
void count_above_threshold(const SimilarCountArgs& args, cudaStream_t stream);
void window_similarity(const WindowSimilarityArgs& args, cudaStream_t stream);
void window_map(const WindowMapArgs& args, cudaStream_t stream);
void keep_topk(const KeepTopkArgs& args, cudaStream_t stream);
void to_csr(const ToCsrArgs& args, cudaStream_t stream);
void compose(const ComposeArgs& args, cudaStream_t stream);
void merge(const MergeArgs& args, cudaStream_t stream);
void merge_backward(const MergeBackwardArgs& args, cudaStream_t stream);
void unmerge(const UnmergeArgs& args, cudaStream_t stream);
// These throw std::invalid_argument above 256 channels a head.
void lookup_gather(const LookupGatherArgs& args, cudaStream_t stream);
void lookup_gather_backward(const LookupGatherBackwardArgs& args, cudaStream_t stream);
void lookup_scatter(const LookupScatterArgs& args, cudaStream_t stream);
void lookup_scatter_backward(const LookupScatterBackwardArgs& args, cudaStream_t stream);

}  // namespace tokred::cuda
