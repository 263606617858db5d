// SPDX-License-Identifier: MIT
// Lookup attention of one head of one image: its few queries are at hand as a whole, its many keys a block at a time.
// Tiles are of keys x queries: what belongs to queries is packed once, and a key's sums are done with its block.
// Keys are cut into chunks, the tasks of the threads, whose sums are added in the order of the chunks: where the cuts
// lie depends on the shape alone, so the result does not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

#include "../common/args.h"
#include "attention_tiles.h"
#include "for_each.h"
#include "stream.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// The bytes that the weights of a block of keys take at most, so that what belongs to it stays in the cache.
constexpr int64_t kWeightBytes = 192 << 10;
// Keys of a chunk, before they are rounded up to whole blocks.
constexpr int64_t kMostOfChunk = 2048;

struct LookupShape {
  int64_t queries;  // M, rounded up to whole vectors
  int64_t sums;     // M, rounded up to whole tiles of sums
  int64_t padded;   // channels, rounded up to whole vectors
  int64_t keys;     // of a block
  int64_t chunk;    // keys of a task
  int64_t chunks;

  int64_t rows() const { return queries * padded; }  // values in the rows of all queries
  int64_t block() const { return keys * padded; }    // values in the rows of a block of keys
  // Including the values that the last tile reads past the end.
  int64_t weights() const { return keys * queries + round_up(kRowRows, kLanes); }
};

template <class Products>
LookupShape lookup_shape(const LookupProblem& a) {
  using Sum = typename Products::Sum;
  constexpr int64_t kWidth = Simd<Sum>::kWidth;
  const int64_t queries = round_up(a.compressed, kWidth);
  const int64_t fitting =
      kWeightBytes / static_cast<int64_t>(sizeof(Sum)) / queries / Products::kTileKeys * Products::kTileKeys;
  const int64_t keys = std::clamp(fitting, Products::kTileKeys, Products::kMostKeys);
  const int64_t tasks = (a.tokens + kMostOfChunk - 1) / kMostOfChunk;
  const int64_t chunk = round_up((a.tokens + tasks - 1) / tasks, keys);
  return {queries, round_up(a.compressed, kRowRows), round_up(a.channels, kWidth), keys,
          chunk,   (a.tokens + chunk - 1) / chunk};
}

// One task: a chunk of the keys of a head of an image.
struct LookupTask {
  int64_t image, head, chunk;
  int64_t first, count;  // of the keys
};

// Goes through the chunks of an image in order, and through all heads of a chunk, whose rows are adjacent in memory.
template <class Work>
void each_chunk(const LookupProblem& a, const LookupShape& s, const Work& work) {
  for_each_dynamic(a.images * s.chunks * a.heads, [&](int64_t task) {
    const int64_t chunk = task / a.heads % s.chunks, first = chunk * s.chunk;
    work(LookupTask{task / a.heads / s.chunks, task % a.heads, chunk, first, std::min(s.chunk, a.tokens - first)});
  });
}

template <class Work>
void each_key_block(const LookupShape& s, const LookupTask& t, const Work& work) {
  for (int64_t first = t.first; first < t.first + t.count; first += s.keys) {
    work(first, std::min(s.keys, t.first + t.count - first));
  }
}

// The row of a token, of (B, H, rows, d) with strides.
template <class T>
const T* strided_row(const void* data, const int64_t (&strides)[3], const LookupTask& t, int64_t row) {
  return static_cast<const T*>(data) + t.image * strides[0] + t.head * strides[1] + row * strides[2];
}

// A row of (B, rows, H, d), contiguous: how results lie. The next row is H d further.
template <class T>
T* result_row(void* data, const LookupProblem& a, int64_t rows, const LookupTask& t, int64_t row) {
  return static_cast<T*>(data) + (((t.image * rows) + row) * a.heads + t.head) * a.channels;
}

// The place of a task's sums among those of all: `each` values a task.
template <class Sum>
Sum* task_sums(Sum* sums, const LookupProblem& a, int64_t chunks, const LookupTask& t, int64_t each) {
  return sums + ((t.image * a.heads + t.head) * chunks + t.chunk) * each;
}

// The start of a head's values, of (B, H, M).
inline int64_t head_start(const LookupProblem& a, const LookupTask& t) {
  return (t.image * a.heads + t.head) * a.compressed;
}

// Rows `first` on of a result (B, N, H, d), from rows of `padded` sums.
template <class T, class Sum>
void store_key_rows(const LookupProblem& a, const LookupShape& s, const LookupTask& t, int64_t first, int64_t count,
                    const Sum* from, void* result) {
  T* to = result_row<T>(result, a, a.tokens, t, first);
  const int64_t stride = a.heads * a.channels;
  if constexpr (std::is_same_v<T, float>) {
    const bool large = a.images * a.tokens * stride * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    const bool aligned = reinterpret_cast<std::uintptr_t>(to) % sizeof(FloatVector) == 0;
    if (large && aligned && a.channels % kLanes == 0) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < a.channels; c += kLanes) {
          stream_vector(*reinterpret_cast<const FloatVector*>(from + i * s.padded + c), to + i * stride + c);
        }
      }
      return stream_end();
    }
  }
  store_rows(from, s.padded, count, a.channels, Sum(1), to, stride);
}

// The lse of the queries; infinity behind the last one, so that weights are 0 there.
template <class Sum>
void load_lse(const LookupProblem& a, const LookupShape& s, const LookupTask& t, const void* lse, Sum* to) {
  std::copy_n(static_cast<const Sum*>(lse) + head_start(a, t), a.compressed, to);
  std::fill(to + a.compressed, to + s.queries, std::numeric_limits<Sum>::infinity());
}

// From scores of a key, to be multiplied by `factor`, to its weights exp(s - lse), in place.
template <class Sum>
void weigh_by_lse(Sum* row, int64_t queries, Sum factor, const Sum* lse) {
#pragma omp simd
  for (int64_t m = 0; m < queries; ++m) row[m] = exponential(row[m] * factor - lse[m]);
}

// The sums over chunks of rows (sums, padded), for each head: stored times `factor` as (B, M, H, d).
template <class T, class Sum>
void store_chunk_sums(const LookupProblem& a, const LookupShape& s, Sum* sums, int64_t each, int64_t offset, Sum factor,
                      void* to) {
  for_each(a.images * a.heads, true, [&](int64_t pair) {
    LookupTask t{pair / a.heads, pair % a.heads, 0, 0, 0};
    Sum* total = task_sums(sums, a, s.chunks, t, each) + offset;
    for (t.chunk = 1; t.chunk < s.chunks; ++t.chunk) {
      const Sum* share = task_sums(sums, a, s.chunks, t, each) + offset;
#pragma omp simd
      for (int64_t i = 0; i < a.compressed * s.padded; ++i) total[i] += share[i];
    }
    store_rows(total, s.padded, a.compressed, a.channels, factor, result_row<T>(to, a, a.compressed, t, 0),
               a.heads * a.channels);
  });
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
