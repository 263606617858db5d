// SPDX-License-Identifier: MIT
// Unmerge: a gather of rows.
#include "copy_row.h"
#include "element.h"
#include "for_each.h"
#include "maps.h"

TOKRED_KERNELS_BEGIN

void unmerge(const UnmergeArgs& a) {
  check_slots("dest", a.dest, a.images * a.tokens, a.num_out);
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* y = static_cast<const T*>(a.y);
    T* x = static_cast<T*>(a.x);
    const int64_t rows = a.images * a.tokens;
    const std::size_t bytes = a.channels * sizeof(T);
    const bool parallel = rows * static_cast<int64_t>(bytes) > kSerialBytes;
    for_each(rows, parallel, [&](int64_t row) {
      T* out = x + row * a.channels;
      const int32_t slot = a.dest[row];
      if (slot < 0) {
        clear_row(out, bytes);
      } else {
        copy_row(out, y + (row / a.tokens * a.num_out + slot) * a.y_stride, bytes);
      }
    });
  });
}

TOKRED_KERNELS_END
