// SPDX-License-Identifier: MIT
// Match: cosine scores in register tiles, of which only the running best of each source is kept; then the choice of
// the r best sources, the slots, and both views of the map.
#include <algorithm>
#include <limits>
#include <memory>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../common/partition.h"
#include "element.h"
#include "maps.h"

TOKRED_KERNELS_BEGIN
namespace {

// A register tile: kTileSources rows times kTilePanels vectors of destinations. With AVX-512 24 of 32 registers hold
// scores, with 16 registers 12 do; the rest are the loaded destinations and one broadcast source.
constexpr int kTileSources = kLanes == 16 ? 8 : 4;
constexpr int kTilePanels = 3;

// Multiply-adds below which one image is matched by one thread.
constexpr int64_t kSerialProducts = 400 * 1000;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Float memory, aligned for the vectors, grown and never shrunk: one per thread, so that calls do not allocate.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      data_.reset(static_cast<float*>(::operator new(floats * sizeof(float), kAlignment)));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// One image's metric, ready for the tiles, and what the tiles find.
struct Problem {
  int64_t channels, sources, destinations;  // destinations: those that may be joined
  int64_t panels;                           // of kLanes destinations
  float* source;                            // (sources rounded up, D)
  float* destination;                       // panels of kLanes: (panel, D, lane)
  float* inverse_src;                       // (sources rounded up)
  float* inverse_dst;                       // (destinations rounded up): NaN where there is none, so that it never wins
  float* best;                              // (sources)
  int32_t* index;                           // (sources)
};

// Token n's metric as floats; the mean over heads is rounded to the metric's own dtype.
template <class T>
void load_token(const MatchArgs& a, int64_t image, int64_t token, float* out) {
  using E = Element<T>;
  const T* metric = static_cast<const T*>(a.metric) + image * a.stride_b + token * a.stride_n;
#pragma omp simd
  for (int64_t d = 0; d < a.channels; ++d) out[d] = static_cast<float>(E::load(metric[d]));
  if (a.heads == 1) return;
  for (int64_t h = 1; h < a.heads; ++h) {
    const T* head = metric + h * a.stride_h;
#pragma omp simd
    for (int64_t d = 0; d < a.channels; ++d) out[d] += static_cast<float>(E::load(head[d]));
  }
  const float heads = static_cast<float>(a.heads);
#pragma omp simd
  for (int64_t d = 0; d < a.channels; ++d) out[d] = static_cast<float>(E::load(E::store(out[d] / heads)));
}

float inverse_norm_of(const float* vector, int64_t channels) {
  float squared = 0;
#pragma omp simd reduction(+ : squared)
  for (int64_t d = 0; d < channels; ++d) squared += vector[d] * vector[d];
  return inverse_norm(squared);
}

template <class T>
void load_sources(const MatchArgs& a, int64_t image, const Problem& p, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    float* row = p.source + i * p.channels;
    load_token<T>(a, image, source_token(a.partition, image, i), row);
    p.inverse_src[i] = inverse_norm_of(row, p.channels);
  }
}

template <class T>
void load_panel(const MatchArgs& a, int64_t image, const Problem& p, int64_t panel, float* row) {
  float* out = p.destination + panel * p.channels * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t j = panel * kLanes + lane;
    if (j < p.destinations) {
      const int32_t number = static_cast<int32_t>(j) + a.partition.protected_dst;
      load_token<T>(a, image, destination_token(a.partition, image, number), row);
      p.inverse_dst[j] = inverse_norm_of(row, p.channels);
      for (int64_t d = 0; d < p.channels; ++d) out[d * kLanes + lane] = row[d];
    } else {
      p.inverse_dst[j] = std::numeric_limits<float>::quiet_NaN();
      for (int64_t d = 0; d < p.channels; ++d) out[d * kLanes + lane] = 0;
    }
  }
}

// The best so far of each source of a tile, a candidate a lane.
struct Best {
  FloatVector score[kTileSources];
  IndexVector index[kTileSources];
};

// Scores kPanels panels of destinations, from destination j on, against a tile of sources.
template <int kPanels>
void scan_panels(const Problem& p, const float* source, const float* inverse_src, int64_t j, Best& best) {
  FloatVector score[kTileSources][kPanels] = {};
  const float* panel = p.destination + j * p.channels;
  const int64_t panel_size = p.channels * kLanes;
  for (int64_t d = 0; d < p.channels; ++d) {
    FloatVector b[kPanels];
#pragma GCC unroll 3
    for (int v = 0; v < kPanels; ++v) {
      b[v] = *reinterpret_cast<const FloatVector*>(panel + v * panel_size + d * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTileSources; ++m) {
      const float s = source[m * p.channels + d];
#pragma GCC unroll 3
      for (int v = 0; v < kPanels; ++v) score[m][v] += s * b[v];
    }
  }
  IndexVector lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l;
#pragma GCC unroll 3
  for (int v = 0; v < kPanels; ++v) {
    const FloatVector scale = *reinterpret_cast<const FloatVector*>(p.inverse_dst + j + v * kLanes);
    const IndexVector number = lane + static_cast<int32_t>(j + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kTileSources; ++m) {
      const FloatVector s = score[m][v] * inverse_src[m] * scale;
      // Numbers only grow along a lane, so "greater" alone leaves the lower one at a tie; NaN is never greater.
      const IndexVector wins = s > best.score[m];
      best.score[m] = wins ? s : best.score[m];
      best.index[m] = wins ? number : best.index[m];
    }
  }
}

// The running best of a tile of sources against all destinations.
void best_of_tile(const Problem& p, int32_t first_number, int64_t from) {
  Best best;
  for (int m = 0; m < kTileSources; ++m) {
    best.score[m] = FloatVector{} - std::numeric_limits<float>::infinity();
    best.index[m] = IndexVector{};
  }
  const float* source = p.source + from * p.channels;
  const float* inverse_src = p.inverse_src + from;
  int64_t j = 0;
  for (; j + kTilePanels * kLanes <= p.panels * kLanes; j += kTilePanels * kLanes) {
    scan_panels<kTilePanels>(p, source, inverse_src, j, best);
  }
  for (; j < p.panels * kLanes; j += kLanes) scan_panels<1>(p, source, inverse_src, j, best);

  for (int m = 0; m < kTileSources && from + m < p.sources; ++m) {
    float score[kLanes];
    int32_t index[kLanes];
    std::memcpy(score, &best.score[m], sizeof(score));
    std::memcpy(index, &best.index[m], sizeof(index));
    float top = score[0];
    int32_t at = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(max : top)
    for (int l = 0; l < kLanes; ++l) top = score[l] > top ? score[l] : top;
#pragma omp simd reduction(min : at)
    for (int l = 0; l < kLanes; ++l) {
      const int32_t candidate = score[l] == top ? index[l] : std::numeric_limits<int32_t>::max();
      at = candidate < at ? candidate : at;
    }
    p.best[from + m] = top;
    p.index[from + m] = first_number + at;
  }
}

// A whole number that is lower for a higher score, and at equal scores for a lower index; scores are no NaN.
uint64_t rank_key(float score, int32_t index) {
  score += 0.0f;  // -0 equals 0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof(bits));
  const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~ascending) << 32 | static_cast<uint32_t>(index);
}

// dest of one image: who joins whom, and who stands where.
void place(const Partition& q, int64_t image, int64_t tokens, const Problem& p, uint64_t* keys, int32_t* dest) {
  std::fill(dest, dest + tokens, -1);
  for (int32_t t = 0; t < q.first; ++t) dest[t] = t;
  for (int32_t j = 0; j < q.num_dst; ++j) dest[destination_token(q, image, j)] = destination_slot(q, j);

  const int32_t candidates = q.num_src - q.protected_src;
  for (int32_t i = 0; i < candidates; ++i) keys[i] = rank_key(p.best[q.protected_src + i], q.protected_src + i);
  // Comparisons of our own: a library instance of the default one could be shared between instruction sets.
  const auto by_rank = [](uint64_t x, uint64_t y) { return x < y; };
  const auto by_index = [](uint64_t x, uint64_t y) { return static_cast<uint32_t>(x) < static_cast<uint32_t>(y); };
  if (q.r > 0 && q.r < candidates) std::nth_element(keys, keys + q.r, keys + candidates, by_rank);
  const auto number = [&](int32_t rank) { return static_cast<int32_t>(keys[rank] & 0xffffffffu); };
  for (int32_t rank = 0; rank < q.r; ++rank) {
    const int32_t i = number(rank);
    dest[source_token(q, image, i)] = destination_slot(q, p.index[i]);
  }
  int32_t unmerged = 0;
  const auto keep = [&](int32_t i) { dest[source_token(q, image, i)] = unmerged_slot(q, unmerged++); };
  for (int32_t i = 0; i < q.protected_src; ++i) keep(i);
  if (q.sources_by_index) {
    std::sort(keys + q.r, keys + candidates, by_index);
  } else {
    std::sort(keys + q.r, keys + candidates, by_rank);
  }
  for (int32_t rank = q.r; rank < candidates; ++rank) keep(number(rank));
}

template <class T>
void match_image(const MatchArgs& a, int64_t image, bool parallel) {
  const Partition& q = a.partition;
  Problem p;
  p.channels = a.channels;
  p.sources = q.num_src;
  p.destinations = std::max(q.num_dst - q.protected_dst, 0);
  const int64_t sources = round_up(p.sources, kTileSources);
  const int64_t destinations = round_up(p.destinations, kLanes);
  p.panels = destinations / kLanes;
  const int64_t padded_sources = round_up(sources, kLanes);  // keeps what follows aligned
  const int64_t source_floats = round_up(sources * p.channels, kLanes);

  thread_local Scratch scratch;
  float* memory =
      scratch.take(source_floats + destinations * p.channels + 5 * padded_sources + destinations + 2 * kLanes);
  p.source = memory;
  p.destination = p.source + source_floats;
  p.inverse_dst = p.destination + destinations * p.channels;
  p.inverse_src = p.inverse_dst + destinations;
  p.best = p.inverse_src + padded_sources;
  p.index = reinterpret_cast<int32_t*>(p.best + padded_sources);
  uint64_t* keys = reinterpret_cast<uint64_t*>(p.best + 2 * padded_sources);

  std::fill(p.source + p.sources * p.channels, p.source + sources * p.channels, 0.0f);
  std::fill(p.inverse_src + p.sources, p.inverse_src + sources, 0.0f);
#pragma omp parallel if (parallel)
  {
    thread_local Scratch row;
    float* one = row.take(round_up(p.channels, kLanes));
#pragma omp for schedule(static) nowait
    for (int64_t panel = 0; panel < p.panels; ++panel) load_panel<T>(a, image, p, panel, one);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.sources; i += kTileSources) {
      load_sources<T>(a, image, p, i, std::min<int64_t>(i + kTileSources, p.sources));
    }
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < p.sources; i += kTileSources) best_of_tile(p, q.protected_dst, i);
  }
  const int64_t num_out = num_slots(q);
  int32_t* dest = a.dest + image * a.tokens;
  place(q, image, a.tokens, p, keys, dest);
  invert_image(dest, image, a.tokens, num_out, a.members + image * a.tokens, a.begin + image * num_out,
               a.count + image * num_out);
}

}  // namespace

void bipartite_match(const MatchArgs& a) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t products = int64_t{a.partition.num_src} * a.partition.num_dst * a.channels;
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
#else
    const int threads = 1;
#endif
    const bool by_image = a.images >= threads;
    const bool parallel = products * a.images > kSerialProducts;
#pragma omp parallel for schedule(dynamic, 1) if (by_image && parallel)
    for (int64_t image = 0; image < a.images; ++image) match_image<T>(a, image, !by_image && parallel);
  });
}

TOKRED_KERNELS_END
