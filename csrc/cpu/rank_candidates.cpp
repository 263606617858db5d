// SPDX-License-Identifier: MIT
// The best destination of each source, and the order of the sources.
#include "match_image.h"

TOKRED_KERNELS_BEGIN

void rank_candidates(const BestMatchArgs& a) {
  constexpr float kNoScore = -std::numeric_limits<float>::infinity();
  match_images(a, [&](const Image& image, const Match& match) {
    const Partition& p = image.partition;
    const int64_t all = a.partition.num_src, from = image.number * all;
    float* score = a.score + from;
    int32_t *partner = a.partner + from, *rank = a.rank + from;
    rank_sources(p, match, rank);
    std::copy(match.score, match.score + p.num_src, score);
    std::copy(match.partner, match.partner + p.num_src, partner);
    std::fill(score, score + std::min(p.protected_src, p.num_src), kNoScore);
    // A shorter image's absent sources.
    std::fill(score + p.num_src, score + all, kNoScore);
    std::fill(partner + p.num_src, partner + all, 0);
    std::fill(rank + p.num_src, rank + all, kNoRank);
  });
}

TOKRED_KERNELS_END
