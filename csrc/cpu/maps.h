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
void invert_image(const int32_t* dest, int64_t first_row, int64_t tokens, int64_t num_out, int32_t* members,
                  int32_t* begin, int32_t* count);

// Throws where a token is in a slot that is not there. Nothing else keeps a map that was made by hand from writing
// past the end of what follows it.
void check_slots(const int32_t* dest, int64_t number, int64_t num_out);

// Slots counted from the image's first become rows of a packed output, in which that one is row `first_slot`.
void offset_slots(int32_t* dest, int64_t tokens, int32_t first_slot);

}  // namespace tokred::cpu
