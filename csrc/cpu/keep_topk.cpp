// SPDX-License-Identifier: MIT
// Keeping the highest scores: whole numbers only, the same for every instruction set.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../common/order.h"
#include "for_each.h"
#include "maps.h"
#include "ops.h"

namespace tokred::cpu {
namespace {

// With fewer tokens than this in total, a second thread takes longer than it saves.
constexpr int64_t kSerialTokens = 1024;

}  // namespace

void keep_topk(const KeepTopkArgs& a) {
  const int64_t slots = int64_t{a.first} + a.k + a.fuse;
  const int64_t candidates = a.tokens - a.first;
  for_each(a.images, a.images * a.tokens > kSerialTokens, [&](int64_t b) {
    thread_local std::vector<uint64_t> keys;
    keys.resize(2 * candidates);
    const float* score = a.score + b * a.stride + a.first;
    for (int64_t n = 0; n < candidates; ++n) {
      const float value = std::isnan(score[n]) ? -INFINITY : score[n];
      keys[n] = pack_candidate(value, static_cast<int32_t>(n));
    }
    const uint64_t* sorted = sort_candidates(keys.data(), candidates, keys.data() + candidates);
    int32_t* dest = a.dest + b * a.tokens;
    for (int32_t n = 0; n < a.first; ++n) dest[n] = n;
    std::fill(dest + a.first, dest + a.tokens, a.fuse ? a.first + a.k : -1);
    for (int32_t place = 0; place < a.k; ++place) dest[a.first + candidate_index(sorted[place])] = a.first + place;
    to_csr_image(dest, b * a.tokens, a.tokens, slots, a.members + b * a.tokens, a.begin + b * slots,
                 a.count + b * slots);
  });
}

}  // namespace tokred::cpu
