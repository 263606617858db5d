// SPDX-License-Identifier: MIT
// Maps: counting sorts and a gather of whole numbers, the same for every instruction set.
#include "maps.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "../common/order.h"
#include "for_each.h"
#include "ops.h"

namespace tokred::cpu {
namespace {

// With fewer tokens than this in total, a second thread takes longer than it saves.
constexpr int64_t kSerialTokens = 16 * 1024;

// Candidates are sorted by the digits of candidate_key.
constexpr int kDigitBits = 8, kDigits = 32 / kDigitBits, kBins = 1 << kDigitBits;

int digit(uint64_t candidate, int place) { return candidate_key(candidate) >> (place * kDigitBits) & (kBins - 1); }

}  // namespace

const uint64_t* sort_candidates(uint64_t* keys, int64_t number, uint64_t* spare) {
  int32_t bins[kDigits][kBins] = {};
  for (int64_t i = 0; i < number; ++i) {
    for (int place = 0; place < kDigits; ++place) ++bins[place][digit(keys[i], place)];
  }
  uint64_t *from = keys, *to = spare;
  for (int place = 0; place < kDigits; ++place) {
    int32_t* begin = bins[place];
    if (number == 0 || begin[digit(from[0], place)] == number) continue;  // the same in all candidates
    int32_t used = 0;
    for (int bin = kBins - 1; bin >= 0; --bin) used += std::exchange(begin[bin], used);
    for (int64_t i = 0; i < number; ++i) to[begin[digit(from[i], place)]++] = from[i];
    std::swap(from, to);
  }
  return from;
}

void to_csr_image(const int32_t* dest, int64_t first_row, int64_t tokens, int64_t num_out, int32_t* members,
                  int32_t* begin, int32_t* count) {
  const int32_t row = static_cast<int32_t>(first_row);
  std::fill(count, count + num_out, 0);
  for (int64_t n = 0; n < tokens; ++n) {
    if (dest[n] >= 0) ++count[dest[n]];
  }
  int32_t used = 0;
  for (int64_t s = 0; s < num_out; ++s) {
    begin[s] = used;  // relative for now: it walks as the slot fills
    used += count[s];
  }
  for (int64_t n = 0; n < tokens; ++n) {
    if (dest[n] >= 0) members[begin[dest[n]]++] = row + static_cast<int32_t>(n);
  }
  std::fill(members + used, members + tokens, -1);
  for (int64_t s = 0; s < num_out; ++s) begin[s] += row - count[s];
}

void offset_slots(int32_t* dest, int64_t tokens, int32_t first_slot) {
  for (int64_t n = 0; n < tokens; ++n) dest[n] += dest[n] < 0 ? 0 : first_slot;
}

void throw_bad_index(const char* argument, int64_t index, int64_t lowest, int64_t end) {
  throw std::runtime_error(std::string(argument) + " must hold values from " + std::to_string(lowest) + " to " +
                           std::to_string(end - 1) + ", got " + std::to_string(index) +
                           " (was the tensor changed in place?)");
}

void check_slots(const char* argument, const int32_t* slots, int64_t number, int64_t num_out) {
  // The sign of a difference says which is larger, except for numbers far below zero; SSE2 lacks a maximum of int32.
  const uint32_t last = static_cast<uint32_t>(num_out) - 1;
  uint32_t signs = 0;
  for (int64_t n = 0; n < number; ++n) signs |= last - static_cast<uint32_t>(slots[n]);
  if (!(signs >> 31)) return;
  const int32_t highest = *std::max_element(slots, slots + number);
  if (highest >= num_out) throw_bad_index(argument, highest, -1, num_out);
}

void to_csr(const ToCsrArgs& a) {
  check_slots("dest", a.dest, a.images * a.tokens, a.num_out);
  for_each(a.images, a.images * a.tokens > kSerialTokens, [&](int64_t b) {
    to_csr_image(a.dest + b * a.tokens, b * a.tokens, a.tokens, a.num_out, a.members + b * a.tokens,
                 a.begin + b * a.num_out, a.count + b * a.num_out);
  });
}

void compose(const ComposeArgs& a) {
  check_slots("first", a.first, a.images * a.tokens, a.middle);
  for_each(a.images, a.images * a.tokens > kSerialTokens, [&](int64_t b) {
    const int32_t* first = a.first + b * a.tokens;
    const int32_t* second = a.second + b * a.middle;
    for (int64_t n = 0; n < a.tokens; ++n) a.dest[b * a.tokens + n] = first[n] < 0 ? -1 : second[first[n]];
  });
}

}  // namespace tokred::cpu
