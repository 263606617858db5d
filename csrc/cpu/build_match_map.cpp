// SPDX-License-Identifier: MIT
// The map of a match: whole numbers only, the same for every instruction set.
#include <algorithm>

#include "../common/slots.h"
#include "for_each.h"
#include "maps.h"
#include "ops.h"

namespace tokred::cpu {
namespace {

// With fewer tokens than this in total, a second thread takes longer than it saves.
constexpr int64_t kSerialTokens = 16 * 1024;

}  // namespace

void dest_of_ranks(const Partition& p, int64_t image, int64_t tokens, const int32_t* partner, const int32_t* rank,
                   int32_t* dest) {
  if (p.r == 0) {
    const int32_t kept = kept_tokens(p);
    for (int64_t n = 0; n < tokens; ++n) dest[n] = n < kept ? static_cast<int32_t>(n) : -1;
    return;
  }
  std::fill(dest, dest + tokens, -1);
  for (int32_t n = 0; n < p.first; ++n) dest[n] = n;
  for (int32_t j = 0; j < p.num_dst; ++j) dest[destination_token(p, image, j)] = destination_slot(p, j);
  int32_t joined = 0;
  for (int32_t i = 0; i < p.num_src; ++i) {
    dest[source_token(p, image, i)] = source_slot(p, i, rank[i], joined, partner[i]);
    joined += joins(p, rank[i]);
  }
}

void build_match_map(const MatchMapArgs& a) {
  const int64_t sources = a.partition.num_src;
  const int64_t all_tokens = a.starts_in ? a.tokens : a.images * a.tokens;
  for_each(a.images, all_tokens > kSerialTokens, [&](int64_t b) {
    const int64_t first_row = a.starts_in ? a.starts_in[b] : b * a.tokens;
    const int64_t tokens = a.starts_in ? a.starts_in[b + 1] - first_row : a.tokens;
    if (first_row < 0 || first_row > all_tokens) throw_bad_index("starts_in", first_row, 0, all_tokens + 1);
    if (tokens < 0 || tokens > all_tokens - first_row) {
      throw_bad_index("starts_in", first_row + tokens, first_row, all_tokens + 1);
    }
    Partition p = a.starts_in ? of_tokens(a.partition, tokens) : a.partition;
    if (p.num_src > sources) throw_bad_index("starts_in", first_row + tokens, first_row, first_row + 2 * sources + 1);
    if (a.counts) p.r = a.counts[b];
    if (p.r < 0 || p.r > p.num_src) throw_bad_index("counts", p.r, 0, p.num_src + 1);
    const int64_t first_slot = a.starts_out ? a.starts_out[b] : b * num_slots(p);
    if (a.starts_out && (first_slot < 0 || first_slot > a.num_out - num_slots(p))) {
      throw_bad_index("starts_out", first_slot, 0, a.num_out - num_slots(p) + 1);
    }
    int32_t* dest = a.dest + first_row;
    dest_of_ranks(p, b, tokens, a.partner + b * sources, a.rank + b * sources, dest);
    check_slots("partner or rank", dest, tokens, num_slots(p));
    to_csr_image(dest, first_row, tokens, num_slots(p), a.members + first_row, a.begin + first_slot,
                 a.count + first_slot);
    if (a.starts_out) offset_slots(dest, tokens, static_cast<int32_t>(first_slot));
  });
}

}  // namespace tokred::cpu
