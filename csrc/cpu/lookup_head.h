// SPDX-License-Identifier: MIT
// Lookup attention of one head of one image: its few queries are at hand as a whole, its many keys a block at a time.
// Keys are cut into chunks, the tasks of the threads, whose sums are added in the order of the chunks: where the cuts
// lie depends on the shape alone, so the result does not depend on the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "../common/args.h"
#include "attention_tiles.h"
#include "stream.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Keys of a block: whole tiles of every kind, and few enough that what belongs to a block stays in the cache.
constexpr int64_t kKeyBlock = 144;
static_assert(kKeyBlock % (kPanels * kLanes) == 0 && kKeyBlock % kRowRows == 0, "blocks must be made of whole tiles");
constexpr int64_t kChunkBlocks = 27;
constexpr int64_t kChunk = kChunkBlocks * kKeyBlock;

struct LookupShape {
  int64_t queries;  // M, rounded up so that whole blocks cover them
  int64_t padded;   // channels, rounded up to whole vectors
  int64_t chunks;
};

template <class Sum>
LookupShape lookup_shape(const LookupProblem& a) {
  return {round_up(a.compressed, kQueryBlock), round_up(a.channels, Simd<Sum>::kWidth),
          (a.tokens + kChunk - 1) / kChunk};
}

// One task: a chunk of the keys of a head of an image.
struct LookupTask {
  int64_t image, head, chunk;
  int64_t first, count;  // of the keys
};

template <class Work>
void each_chunk(const LookupProblem& a, int64_t chunks, const Work& work) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t task = 0; task < a.images * a.heads * chunks; ++task) {
    const int64_t chunk = task % chunks, pair = task / chunks, first = chunk * kChunk;
    work(LookupTask{pair / a.heads, pair % a.heads, chunk, first, std::min(kChunk, a.tokens - first)});
  }
}

template <class Work>
void each_key_block(const LookupTask& t, const Work& work) {
  for (int64_t first = t.first; first < t.first + t.count; first += kKeyBlock) {
    work(first, std::min(kKeyBlock, t.first + t.count - first));
  }
}

template <class Work>
void each_query_block(const LookupProblem& a, const Work& work) {
  for (int64_t first = 0; first < a.compressed; first += kQueryBlock) {
    work(first, std::min<int64_t>(kQueryBlock, a.compressed - first));
  }
}

// The row of a token, of (B, H, rows, d) with strides.
template <class T>
const T* strided_row(const void* data, const int64_t (&strides)[3], const LookupTask& t, int64_t row) {
  return static_cast<const T*>(data) + t.image * strides[0] + t.head * strides[1] + row * strides[2];
}

// What the next key block reads of a tensor, fetched a few rows at a time, so that loading runs beside the products:
// the rows of a head lie a whole token apart, and the processor's own prefetching takes those of other heads for next.
template <class T>
class NextRows {
 public:
  NextRows(const LookupProblem& a, const LookupTask& t, int64_t block, const void* data, const int64_t (&strides)[3])
      : bytes_(a.channels * static_cast<int64_t>(sizeof(T))),
        stride_(strides[2] * static_cast<int64_t>(sizeof(T))),
        left_(std::min(kKeyBlock, t.first + t.count - block - kKeyBlock)),
        share_((kKeyBlock + a.compressed - 1) / a.compressed) {
    if (left_ > 0) row_ = reinterpret_cast<const char*>(strided_row<T>(data, strides, t, block + kKeyBlock));
  }

  // Called once a query.
  void fetch_some() {
    for (int64_t i = 0; i < share_ && left_ > 0; ++i, --left_, row_ += stride_) {
      for (int64_t byte = 0; byte < bytes_; byte += kLineBytes) __builtin_prefetch(row_ + byte, 0, kSecondLevel);
    }
  }

 private:
  static constexpr int64_t kLineBytes = 64;
  static constexpr int kSecondLevel = 2;
  const char* row_ = nullptr;
  int64_t bytes_, stride_, left_, share_;
};

// A row of (B, rows, H, d), contiguous: how results lie. The next row is H d further.
template <class T>
T* result_row(void* data, const LookupProblem& a, int64_t rows, const LookupTask& t, int64_t row) {
  return static_cast<T*>(data) + (((t.image * rows) + row) * a.heads + t.head) * a.channels;
}

// The place of a task's sums among those of all: `each` values a task.
template <class Sum>
Sum* task_sums(std::vector<Sum>& sums, const LookupProblem& a, int64_t chunks, const LookupTask& t, int64_t each) {
  return sums.data() + ((t.image * a.heads + t.head) * chunks + t.chunk) * each;
}

// The start of a head's values, of (B, H, M).
inline int64_t head_start(const LookupProblem& a, const LookupTask& t) {
  return (t.image * a.heads + t.head) * a.compressed;
}

template <class T, class Sum>
void store_result(const Sum* from, int64_t padded, int64_t count, int64_t channels, Sum factor, T* to, int64_t stride) {
  for (int64_t i = 0; i < count; ++i) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) to[i * stride + c] = Element<T>::store(from[i * padded + c] * factor);
  }
}

template <class T, class Sum>
void add_result(const Sum* from, int64_t padded, int64_t count, int64_t channels, Sum factor, T* to, int64_t stride) {
  using E = Element<T>;
  for (int64_t i = 0; i < count; ++i) {
    T* row = to + i * stride;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) row[c] = E::store(from[i * padded + c] * factor + E::load(row[c]));
  }
}

// Rows `first` on of a result (B, N, H, d): times `factor`, from rows of `padded` sums; `onto` adds to what is there.
template <class T, class Sum>
void store_key_rows(const LookupProblem& a, const LookupShape& s, const LookupTask& t, int64_t first, int64_t count,
                    const Sum* from, Sum factor, void* result, bool onto = false) {
  T* to = result_row<T>(result, a, a.tokens, t, first);
  const int64_t stride = a.heads * a.channels;
  if constexpr (std::is_same_v<T, float>) {
    const bool large = a.images * a.tokens * stride * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
    const bool aligned = reinterpret_cast<std::uintptr_t>(to) % sizeof(FloatVector) == 0;
    if (large && aligned && a.channels % kLanes == 0) {
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < a.channels; c += kLanes) {
          FloatVector value = *reinterpret_cast<const FloatVector*>(from + i * s.padded + c) * factor;
          if (onto) value += *reinterpret_cast<const FloatVector*>(to + i * stride + c);
          stream_vector(value, to + i * stride + c);
        }
      }
      return stream_end();
    }
  }
  if (onto) return add_result(from, s.padded, count, a.channels, factor, to, stride);
  store_result(from, s.padded, count, a.channels, factor, to, stride);
}

template <class Sum>
void add_rows(const Sum* from, int64_t values, Sum* to) {
#pragma omp simd
  for (int64_t i = 0; i < values; ++i) to[i] += from[i];
}

template <class Sum>
void clear(Sum* values, int64_t number) {
  std::memset(static_cast<void*>(values), 0, number * sizeof(Sum));
}

// From products q . k to weights exp(s - lse), in place.
template <class Sum>
void weigh_by_lse(Sum* row, int64_t count, Sum scale, Sum lse) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) row[j] = exponential(row[j] * scale - lse);
}

// The sums over chunks of rows (queries, padded), for each head: stored times `factor` as (B, M, H, d).
template <class T, class Sum>
void store_chunk_sums(const LookupProblem& a, const LookupShape& s, std::vector<Sum>& sums, int64_t each,
                      int64_t offset, Sum factor, void* to) {
#pragma omp parallel for schedule(static)
  for (int64_t pair = 0; pair < a.images * a.heads; ++pair) {
    LookupTask t{pair / a.heads, pair % a.heads, 0, 0, 0};
    Sum* total = task_sums(sums, a, s.chunks, t, each) + offset;
    for (t.chunk = 1; t.chunk < s.chunks; ++t.chunk) {
      add_rows(task_sums(sums, a, s.chunks, t, each) + offset, s.queries * s.padded, total);
    }
    store_result(total, s.padded, a.compressed, a.channels, factor, result_row<T>(to, a, a.compressed, t, 0),
                 a.heads * a.channels);
  }
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
