// SPDX-License-Identifier: MIT
// The arithmetic of Windows (see args.h).
#pragma once

#include "args.h"
#include "numerics.h"

namespace tokred {

TOKRED_HD int32_t num_windows(const Windows& w) { return (w.grid_height / w.height) * (w.grid_width / w.width); }

TOKRED_HD int32_t window_size(const Windows& w) { return w.height * w.width; }

TOKRED_HD int32_t num_tokens(const Windows& w) { return w.first + w.grid_height * w.grid_width; }

// The tokens of a window are numbered row by row.
TOKRED_HD int32_t window_token(const Windows& w, int32_t window, int32_t place) {
  const int32_t across = w.grid_width / w.width;
  const int32_t y = window / across * w.height + place / w.width, x = window % across * w.width + place % w.width;
  return w.first + y * w.grid_width + x;
}

// The number that a token has among those of its window.
TOKRED_HD int32_t place_in_window(const Windows& w, int32_t token) {
  const int32_t y = (token - w.first) / w.grid_width, x = (token - w.first) % w.grid_width;
  return y % w.height * w.width + x % w.width;
}

}  // namespace tokred
