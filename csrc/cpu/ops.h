// SPDX-License-Identifier: MIT
// The CPU ops. Each picks the widest instruction set the machine has, at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/args.h"

namespace tokred::cpu {

void bipartite_match(const MatchArgs& args);
void rank_candidates(const BestMatchArgs& args);
void build_match_map(const MatchMapArgs& args);
void count_above_threshold(const SimilarCountArgs& args);
void window_similarity(const WindowSimilarityArgs& args);
void window_map(const WindowMapArgs& args);
void to_csr(const ToCsrArgs& args);
void compose(const ComposeArgs& args);
void merge(const MergeArgs& args);
void merge_backward(const MergeBackwardArgs& args);
void unmerge(const UnmergeArgs& args);
void keep_topk(const KeepTopkArgs& args);
void token_attention(const TokenAttentionArgs& args);
void token_attention_backward(const TokenAttentionBackwardArgs& args);
void lookup_gather(const LookupGatherArgs& args);
void lookup_gather_backward(const LookupGatherBackwardArgs& args);
void lookup_scatter(const LookupScatterArgs& args);
void lookup_scatter_backward(const LookupScatterBackwardArgs& args);
const char* instruction_set();
// Advises the system to map this memory in large pages: fewer faults when it is first written, fewer misses after.
void use_large_pages(void* data, std::size_t bytes);

}  // namespace tokred::cpu
