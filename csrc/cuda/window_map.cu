// SPDX-License-Identifier: MIT
// The map that merges the windows of highest score, a block an image. Slots are laid out so that both views have closed
// forms once the order of the windows is known: no members are counted or collected.
#include "../common/order.h"
#include "../common/windows.h"
#include "block_scan.cuh"
#include "block_sort.cuh"
#include "launch.h"
#include "ops.h"
#include "ptx.cuh"

namespace tokred::cuda {
namespace {

constexpr const char* kName = "window_map";

// An image has one block, so as many warps as there can be.
constexpr int kMapThreads = 1024;

// The memory of an image's members, aligned for a value of 8 bytes for each window. It is large enough: a window has at
// least two tokens, and if windows cover the image, its members start at a multiple of 8 bytes.
__device__ __forceinline__ uint64_t* align_values(int32_t* members) {
  return reinterpret_cast<uint64_t*>(round_up(reinterpret_cast<uintptr_t>(members), sizeof(uint64_t)));
}

__global__ void __launch_bounds__(kMapThreads)
    map_windows(const __grid_constant__ WindowMapArgs args, bool order_in_shared) {
  const Windows& w = args.windows;
  const int64_t image = blockIdx.x;
  const int32_t number = num_windows(w), size = window_size(w), tokens = num_tokens(w), first = w.first;
  const int32_t r = args.counts ? args.counts[image] : args.r;
  const int64_t row0 = image * tokens;
  const int64_t slot_row = args.starts_out ? args.starts_out[image] : image * (tokens - r * (size - 1));
  const int32_t slot0 = args.starts_out ? args.starts_out[image] : 0;  // packed maps number all images' slots as one
  int32_t* dest = args.dest + row0;
  int32_t* members = args.members + row0;

  for (int32_t t = first + threadIdx.x; t < tokens; t += kMapThreads) dest[t] = -1;
  if (r > 0) {
    uint64_t* order = order_in_shared ? reinterpret_cast<uint64_t*>(dynamic_shared()) : align_values(members);
    const float* score = args.score + image * number;
    for (int32_t i = threadIdx.x; i < number; i += kMapThreads) order[i] = pack_candidate(score[i], i);
    sort_descending<kMapThreads>(order, number);
    for (int32_t rank = threadIdx.x; rank < r; rank += kMapThreads) {
      const int32_t window = candidate_index(order[rank]);
      for (int32_t k = 0; k < size; ++k) dest[window_token(w, window, k)] = slot0 + first + rank;
    }
  }
  __syncthreads();

  int32_t others = 0;  // tokens of the rounds before this one that are in no merged window
  for (int32_t start = 0; start < tokens; start += kMapThreads) {
    const int32_t t = start + static_cast<int32_t>(threadIdx.x);
    const bool other = t >= first && t < tokens && dest[t] < 0;
    int32_t total;
    const int32_t before = others + exclusive_scan<kMapThreads>(other, total);
    others += total;
    if (t >= tokens) continue;
    int32_t slot = t, begin = t, place = 0, count = 1;
    if (other) {
      slot = first + r + before;
      begin = first + r * size + before;
    } else if (t >= first) {
      slot = dest[t] - slot0;
      begin = first + (slot - first) * size;
      place = place_in_window(w, t);
      count = size;
    }
    dest[t] = slot0 + slot;
    members[begin + place] = static_cast<int32_t>(row0) + t;
    if (place > 0) continue;
    args.begin[slot_row + slot] = static_cast<int32_t>(row0) + begin;
    args.count[slot_row + slot] = count;
  }
}

}  // namespace

void window_map(const WindowMapArgs& args, cudaStream_t stream) {
  if (args.images == 0 || num_tokens(args.windows) == 0) return;
  const int64_t bytes = num_windows(args.windows) * static_cast<int64_t>(sizeof(uint64_t));
  const bool order_in_shared = bytes <= shared_limit(kName);
  launch(kName, map_windows, args.images, kMapThreads, order_in_shared ? static_cast<int>(bytes) : 0, stream, args,
         order_in_shared);
}

}  // namespace tokred::cuda
