// SPDX-License-Identifier: MIT
// Whole numbers: the order of scores, and both views of one image's map. Slots are counted from the image's first; rows
// are absolute.
#pragma once

#include <cstdint>

#include "../common/args.h"

namespace tokred::cpu {

// Sorts the results of pack_candidate, given by index, from the winner to the loser. Returns a pointer to the sorted
// keys, in `keys` or in `spare`, which have the same size.
const uint64_t* sort_candidates(uint64_t* keys, int64_t number, uint64_t* spare);

// dest (N) of the map in which the sources of rank under `r` join their partners, both (num_src); image `image`'s
// tokens are split as `partition` says.
void dest_of_ranks(const Partition& partition, int64_t image, int64_t tokens, const int32_t* partner,
                   const int32_t* rank, int32_t* dest);

// From dest (N) of an image whose tokens start at row `first_row`: its part of members (N), begin (N') and count (N'),
// by counting.
void to_csr_image(const int32_t* dest, int64_t first_row, int64_t tokens, int64_t num_out, int32_t* members,
                  int32_t* begin, int32_t* count);

// Throws an error that names an argument with an invalid index: TokenMap validates its tensors once, and they can
// change in place afterwards.
[[noreturn]] void throw_bad_index(const char* argument, int64_t index, int64_t lowest, int64_t end);

// Throws if a token's slot is not below num_out. `argument` holds the slots; negative slots mean dropped tokens.
void check_slots(const char* argument, const int32_t* slots, int64_t number, int64_t num_out);

namespace {

// Throws unless every slot of a map lies within `members`, whose entries are below rows_in. `a`: MergeArgs or
// MergeBackwardArgs. Entries outside the slots are -1; check_members finds those inside. The loops collect the signs of
// differences, as those of check_slots do: comparisons take ten times as long.
template <class Args>
void check_slots_and_members(const Args& a, int64_t rows_in, int64_t rows_out) {
  check_slots("members", a.members, a.num_members, rows_in);
  const uint32_t size = static_cast<uint32_t>(a.num_members);
  uint32_t signs = 0;
  for (int64_t row = 0; row < rows_out; ++row) {
    const uint32_t begin = static_cast<uint32_t>(a.begin[row]), count = static_cast<uint32_t>(a.count[row]);
    signs |= begin | count | (size - begin) | (size - begin - count);
  }
  for (int64_t row = 0; signs >> 31 && row < rows_out; ++row) {
    const int64_t begin = a.begin[row], count = a.count[row];
    if (begin < 0 || begin > size) throw_bad_index("begin", begin, 0, size + int64_t{1});
    if (count < 0 || count > size - begin) throw_bad_index("count", count, 0, size - begin + 1);
  }
}

// Throws if one of a slot's members is negative.
inline void check_members(const int32_t* members, int32_t count) {
  int32_t lowest = count > 0 ? members[0] : 0;
  for (int32_t m = 1; m < count; ++m) lowest |= members[m];
  if (__builtin_expect(lowest < 0, 0)) throw_bad_index("members", -1, 0, int64_t{1} << 31);
}

}  // namespace

// Slots counted from the image's first become rows of a packed output, in which that one is row `first_slot`.
void offset_slots(int32_t* dest, int64_t tokens, int32_t first_slot);

}  // namespace tokred::cpu
