// SPDX-License-Identifier: MIT
// Whole numbers: the order of scores, and both views of one image's map. Slots are counted from the image's first; rows
// are absolute.
#pragma once

#include <cstdint>

#include "../common/args.h"

namespace tokred::cpu {

// Sorts what pack_candidate makes, given by index, from the one that wins to the one that loses. Returns where they are
// then: in `keys` or in `spare`, of the same size.
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

// Throws if the members of output row `row` are not rows of x. `a`: MergeArgs or MergeBackwardArgs.
template <class Args>
void check_members(const Args& a, int64_t row, int64_t rows_in) {
  const int64_t begin = a.begin[row], count = a.count[row];
  if (begin < 0 || begin > a.num_members) throw_bad_index("begin", begin, 0, a.num_members + 1);
  if (count < 0 || count > a.num_members - begin) throw_bad_index("count", count, 0, a.num_members - begin + 1);
  for (int64_t m = begin; m < begin + count; ++m) {
    if (a.members[m] < 0 || a.members[m] >= rows_in) throw_bad_index("members", a.members[m], 0, rows_in);
  }
}

}  // namespace

// Slots counted from the image's first become rows of a packed output, in which that one is row `first_slot`.
void offset_slots(int32_t* dest, int64_t tokens, int32_t first_slot);

}  // namespace tokred::cpu
