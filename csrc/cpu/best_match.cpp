// SPDX-License-Identifier: MIT
// The best destination of each source, and the full order of the sources.
#include "match_image.h"

TOKRED_KERNELS_BEGIN

void best_match(const BestMatchArgs& a) {
  constexpr float kNoScore = -std::numeric_limits<float>::infinity();
  match_images(a, [&](const Image& image, const Match& match) {
    const Partition& p = image.partition;
    const int64_t from = image.number * a.partition.num_src, to = from + a.partition.num_src;
    const int64_t candidates = candidate_keys(p, match);
    std::sort(match.keys, match.keys + candidates, goes_before);
    write_ranks(p, match, candidates, a.rank + from);
    std::copy(match.score, match.score + p.num_src, a.score + from);
    std::copy(match.partner, match.partner + p.num_src, a.partner + from);
    std::fill(a.score + from, a.score + from + p.num_src - candidates, kNoScore);
    // A shorter image's absent sources.
    std::fill(a.score + from + p.num_src, a.score + to, kNoScore);
    std::fill(a.partner + from + p.num_src, a.partner + to, 0);
    std::fill(a.rank + from + p.num_src, a.rank + to, kNoRank);
  });
}

TOKRED_KERNELS_END
