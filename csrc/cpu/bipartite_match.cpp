// SPDX-License-Identifier: MIT
// Match and map in one call: of the order of the sources only what the map needs is found.
#include "maps.h"
#include "match_image.h"

TOKRED_KERNELS_BEGIN
namespace {

void rank_as_needed(const Partition& p, const Match& match) {
  const int64_t candidates = candidate_keys(p, match);
  uint64_t* keys = match.keys;
  if (p.r > 0 && p.r < candidates) std::nth_element(keys, keys + p.r, keys + candidates, goes_before);
  if (!p.sources_by_index) std::sort(keys + p.r, keys + candidates, goes_before);
  write_ranks(p, match, candidates, match.rank);
}

}  // namespace

void bipartite_match(const MatchArgs& a) {
  match_images(a, [&](const Image& image, const Match& match) {
    const Partition& p = image.partition;
    const int64_t first_row = image.number * a.tokens, num_out = num_slots(p);
    int32_t* dest = a.dest + first_row;
    rank_as_needed(p, match);
    dest_of_ranks(p, image.number, a.tokens, match.partner, match.rank, dest);
    invert_image(dest, first_row, a.tokens, num_out, a.members + first_row, a.begin + image.number * num_out,
                 a.count + image.number * num_out);
  });
}

TOKRED_KERNELS_END
