// SPDX-License-Identifier: MIT
// Both views of one image's map.
#pragma once

#include <cstdint>

namespace tokred::cpu {

// From dest (N) of image `image`: its part of members (N), begin (N') and count (N'), by counting.
void invert_image(const int32_t* dest, int64_t image, int64_t tokens, int64_t num_out, int32_t* members, int32_t* begin,
                  int32_t* count);

}  // namespace tokred::cpu
