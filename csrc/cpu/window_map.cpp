// SPDX-License-Identifier: MIT
// The map of merged windows: whole numbers only, the same for every instruction set.
#include <algorithm>
#include <vector>

#include "../common/order.h"
#include "../common/windows.h"
#include "for_each.h"
#include "maps.h"
#include "ops.h"

namespace tokred::cpu {
namespace {

// With fewer windows than this in total, a second thread takes longer than it saves.
constexpr int64_t kSerialWindows = 512;
// The rank of a window that does not merge.
constexpr int32_t kNotMerged = -1;

// Finds the rank of each window among the `r` that merge. `keys` holds two keys for each window.
void rank_windows(const float* score, int64_t windows, int32_t r, std::vector<uint64_t>& keys,
                  std::vector<int32_t>& rank) {
  for (int64_t w = 0; w < windows; ++w) keys[w] = pack_candidate(score[w], static_cast<int32_t>(w));
  const uint64_t* sorted = sort_candidates(keys.data(), windows, keys.data() + windows);
  std::fill(rank.begin(), rank.end(), kNotMerged);
  for (int32_t place = 0; place < r; ++place) rank[candidate_index(sorted[place])] = place;
}

void dest_of_windows(const Windows& w, const std::vector<int32_t>& rank, int32_t r, int32_t* dest) {
  const int32_t down = w.grid_height / w.height, across = w.grid_width / w.width;
  for (int32_t n = 0; n < w.first; ++n) *dest++ = n;
  int32_t other = w.first + r;
  for (int32_t y = 0; y < w.grid_height; ++y) {
    const int32_t row = y / w.height;
    int32_t x = 0;
    for (int32_t column = 0; row < down && column < across; ++column) {
      const int32_t place = rank[row * across + column];
      for (int32_t end = x + w.width; x < end; ++x) *dest++ = place == kNotMerged ? other++ : w.first + place;
    }
    for (; x < w.grid_width; ++x) *dest++ = other++;
  }
}

}  // namespace

void window_map(const WindowMapArgs& a) {
  const Windows& w = a.windows;
  const int64_t tokens = num_tokens(w), windows = num_windows(w), gone = window_size(w) - 1;
  for_each(a.images, a.images * windows > kSerialWindows, [&](int64_t b) {
    thread_local std::vector<uint64_t> keys;
    thread_local std::vector<int32_t> rank;
    keys.resize(2 * windows), rank.resize(windows);
    const int32_t r = a.counts ? a.counts[b] : a.r;
    if (r < 0 || r > windows) throw_bad_index("counts", r, 0, windows + 1);
    const int64_t slots = tokens - r * gone;
    const int64_t first_slot = a.starts_out ? a.starts_out[b] : b * slots;
    if (first_slot < 0 || first_slot > a.num_slots - slots) {
      throw_bad_index("starts_out", first_slot, 0, a.num_slots - slots + 1);
    }
    int32_t* dest = a.dest + b * tokens;
    rank_windows(a.score + b * windows, windows, r, keys, rank);
    dest_of_windows(w, rank, r, dest);
    to_csr_image(dest, b * tokens, tokens, slots, a.members + b * tokens, a.begin + first_slot, a.count + first_slot);
    if (a.starts_out) offset_slots(dest, tokens, static_cast<int32_t>(first_slot));
  });
}

}  // namespace tokred::cpu
