// SPDX-License-Identifier: MIT
// Match and map in one call.
#include "match_image.h"

TOKRED_KERNELS_BEGIN

void bipartite_match(const MatchArgs& a) {
  match_images(a, [&](const Image& image, const Match& match) {
    const Partition& p = image.partition;
    const int64_t first_row = image.number * a.tokens, num_out = num_slots(p);
    int32_t* dest = a.dest + first_row;
    rank_sources(p, match, match.rank);
    dest_of_ranks(p, image.number, a.tokens, match.partner, match.rank, dest);
    to_csr_image(dest, first_row, a.tokens, num_out, a.members + first_row, a.begin + image.number * num_out,
                 a.count + image.number * num_out);
  });
}

TOKRED_KERNELS_END
