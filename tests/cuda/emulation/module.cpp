// SPDX-License-Identifier: MIT
// The part of the emulated module that is not in csrc/bindings.cpp: `_emulation`, a second Python module in the same
// file, which controls how blocks run and returns launch configurations; and stubs for the CPU kernels.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "../../../csrc/common/match_config.h"
#include "../../../csrc/common/order.h"
#include "../../../csrc/common/row_config.h"
#include "../../../csrc/cpu/ops.h"
#include "emulator.h"

namespace tokred::cpu {

#define ABSENT(op, Args) \
  void op(const Args&) { throw std::runtime_error("the emulated module has no CPU kernels"); }
ABSENT(bipartite_match, MatchArgs)
ABSENT(rank_candidates, BestMatchArgs)
ABSENT(build_match_map, MatchMapArgs)
ABSENT(count_above_threshold, SimilarCountArgs)
ABSENT(window_similarity, WindowSimilarityArgs)
ABSENT(window_map, WindowMapArgs)
ABSENT(to_csr, ToCsrArgs)
ABSENT(compose, ComposeArgs)
ABSENT(merge, MergeArgs)
ABSENT(merge_backward, MergeBackwardArgs)
ABSENT(unmerge, UnmergeArgs)
ABSENT(keep_topk, KeepTopkArgs)
ABSENT(token_attention, TokenAttentionArgs)
ABSENT(token_attention_backward, TokenAttentionBackwardArgs)
ABSENT(lookup_gather, LookupGatherArgs)
ABSENT(lookup_gather_backward, LookupGatherBackwardArgs)
ABSENT(lookup_scatter, LookupScatterArgs)
ABSENT(lookup_scatter_backward, LookupScatterBackwardArgs)
const char* instruction_set() { return "none"; }
void use_large_pages(void*, std::size_t) {}

}  // namespace tokred::cpu

namespace {

using namespace tokred;

void configure(int shared_limit, bool reversed) {
  emulation::device().shared_limit = shared_limit;
  emulation::device().reversed = reversed;
}

// Return (one launch is enough, what stays in shared memory, its bytes, the splits, bytes of the candidates).
auto match_config_of(int64_t images, int64_t heads, int64_t tokens, int64_t channels, DType dtype, int num_src,
                     int num_dst, int64_t shared_limit) {
  MatchArgs a{};
  a.images = images, a.heads = heads, a.tokens = tokens, a.channels = channels, a.dtype = dtype;
  a.partition.num_src = num_src, a.partition.num_dst = num_dst;
  const MatchConfig c = match_config(a, shared_limit);
  return std::make_tuple(c.fused, static_cast<int>(c.resident), c.shared_bytes, c.splits,
                         candidate_bytes(c, images, num_src));
}

auto row_config_of(int64_t channels, int element_bytes, uintptr_t alignment) {
  const RowConfig c = row_config(channels, element_bytes, alignment);
  return std::make_tuple(c.vector_bytes, c.vectors, c.lanes_log2, c.rows_per_block);
}

auto window_config_of(const Windows& w, int64_t channels, int element_bytes, uintptr_t alignment) {
  const WindowConfig c = window_config(w, channels, element_bytes, alignment);
  return std::make_tuple(c.units, 1 << c.lanes_log2, c.windows_per_block, c.blocks_per_image, c.whole);
}

// Return the key of each score, and true if the candidate packed from score and index unpacks to all three.
auto ordered_keys(const std::vector<float>& scores) {
  std::vector<std::pair<uint32_t, bool>> result;
  for (int32_t i = 0; i < static_cast<int32_t>(scores.size()); ++i) {
    const uint32_t key = ordered_key(scores[i]);
    const uint64_t candidate = pack_candidate(scores[i], i);
    const bool whole =
        candidate_key(candidate) == key && candidate_index(candidate) == i && key_score(key) == scores[i];
    result.emplace_back(key, whole);
  }
  return result;
}

}  // namespace

PYBIND11_MODULE(_emulation, m) {
  m.def("configure", &configure);
  m.def("match_config", [](int64_t images, int64_t heads, int64_t tokens, int64_t channels, int dtype, int num_src,
                           int num_dst, int64_t shared_limit) {
    return match_config_of(images, heads, tokens, channels, static_cast<DType>(dtype), num_src, num_dst, shared_limit);
  });
  m.def("row_config", &row_config_of);
  m.def("window_config", [](const std::array<int32_t, 5>& w, int64_t channels, int element_bytes, uintptr_t alignment) {
    return window_config_of({w[0], w[1], w[2], w[3], w[4]}, channels, element_bytes, alignment);
  });
  m.def("ordered_keys", &ordered_keys);
}
