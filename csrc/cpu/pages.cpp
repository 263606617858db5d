// SPDX-License-Identifier: MIT
// Large pages for large results.
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "ops.h"

namespace tokred::cpu {

void use_large_pages(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = reinterpret_cast<std::uintptr_t>(data);
  const auto first = (start + page - 1) / page * page, end = (start + bytes) / page * page;
  // Only advice: a system without large pages refuses it, and nothing is the worse.
  if (end > first) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace tokred::cpu
