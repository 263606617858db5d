// SPDX-License-Identifier: MIT
// Ranks of many sources: counted by bins of the score, and one by one inside a bin alone.
#pragma once

#include "../common/order.h"
#include "../common/slots.h"
#include "block_scan.cuh"

namespace tokred::cuda {

constexpr int kBinThreads = 1024;
// Sources that a block ranks. All blocks of an image fill all bins, so that none waits for another; the fewer they are,
// the less of that is done twice.
constexpr int kBinSources = 192;

// A bin is an octave of 1 - score, cut into 128: as fine for scores close to 1 as for others.
constexpr int kOctaveShift = 16;     // of the bits of a float, 7 of the fraction's stay
constexpr float kFinest = 0x1p-24f;  // nothing but 0 is closer to 1
constexpr int kBins = 4096;          // 26 octaves of 128 up to a difference of 4, and more than enough
constexpr int kBinsOfThread = kBins / kBinThreads;

// The bin of a key: the better the score, the lower its bin, and equal keys have the same.
__device__ __forceinline__ int32_t bin_of(uint32_t key) {
  const uint32_t finest = ordered_key(kFinest) >> kOctaveShift;
  const uint32_t octaves = ordered_key(fmaxf(1.0f - key_score(key), kFinest)) >> kOctaveShift;
  return min(static_cast<int32_t>(octaves - finest), kBins - 1);
}

// What a block keeps in shared memory: of each source of the image its key and a place in the order, and where the bins
// start.
struct Bins {
  int32_t* starts;  // (kBins)
  uint32_t* keys;   // (num_src), kAbsentKey of a source that takes no part
  int32_t* order;   // (num_src): those that do, by bin, in any order inside a bin
};

constexpr int64_t bins_bytes(int64_t num_src) { return (kBins + 2 * num_src) * static_cast<int64_t>(sizeof(int32_t)); }

__device__ __forceinline__ Bins bins_at(char* shared, int32_t num_src) {
  int32_t* starts = reinterpret_cast<int32_t*>(shared);
  int32_t* keys = starts + kBins;
  return {starts, reinterpret_cast<uint32_t*>(keys), keys + num_src};
}

// Keys that a thread asks for at a time, so that they are on their way together.
constexpr int kKeysAtOnce = 4;

// Fills the bins; keys_of(i, keys) gives the keys of sources i, i + kBinThreads and so on, kAbsentKey past the last.
// Ends with a barrier, and then `starts` of a bin is where the next one starts.
template <class KeysOf>
__device__ __forceinline__ void fill_bins(const Bins& bins, int32_t num_src, KeysOf keys_of) {
  const int32_t thread = threadIdx.x;
  for (int32_t k = thread; k < kBins; k += kBinThreads) bins.starts[k] = 0;
  __syncthreads();
  for (int32_t start = thread; start < num_src; start += kKeysAtOnce * kBinThreads) {
    uint32_t key[kKeysAtOnce];
    keys_of(start, key);
#pragma unroll
    for (int k = 0; k < kKeysAtOnce; ++k) {
      if (start + k * kBinThreads < num_src) bins.keys[start + k * kBinThreads] = key[k];
      if (key[k] != kAbsentKey) atomicAdd(&bins.starts[bin_of(key[k])], 1);
    }
  }
  __syncthreads();
  int32_t size[kBinsOfThread], sum = 0;
#pragma unroll
  for (int k = 0; k < kBinsOfThread; ++k) sum += size[k] = bins.starts[thread * kBinsOfThread + k];
  int32_t total;
  int32_t start = exclusive_scan<kBinThreads>(sum, total);
#pragma unroll
  for (int k = 0; k < kBinsOfThread; ++k) {
    bins.starts[thread * kBinsOfThread + k] = start;
    start += size[k];
  }
  __syncthreads();
  for (int32_t i = thread; i < num_src; i += kBinThreads) {
    const uint32_t key = bins.keys[i];
    if (key != kAbsentKey) bins.order[atomicAdd(&bins.starts[bin_of(key)], 1)] = i;
  }
  __syncthreads();
}

// How many come before source i, which takes part. The lanes of a warp share the source, and all get the answer.
__device__ __forceinline__ int32_t rank_in_bins(const Bins& bins, int32_t i) {
  const uint32_t own = bins.keys[i];
  const int32_t bin = bin_of(own), start = bin == 0 ? 0 : bins.starts[bin - 1], end = bins.starts[bin];
  int32_t before = 0;
  for (int32_t m = start + static_cast<int32_t>(threadIdx.x) % kLanes; m < end; m += kLanes) {
    const int32_t other = bins.order[m];
    const uint32_t key = bins.keys[other];
    before += key > own || (key == own && other < i);
  }
  return start + sum_of_lanes<kLanes>(before);
}

}  // namespace tokred::cuda
