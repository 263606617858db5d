// SPDX-License-Identifier: MIT
// The match of whole images over the threads, and the order of their sources.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <atomic>
#include <thread>

#include "../common/order.h"
#include "for_each.h"
#include "maps.h"
#include "match_tile.h"
#if defined(__AMX_BF16__)
#include "match_amx.h"
#endif
#include "scratch.h"

namespace tokred::cpu::TOKRED_ISA {
namespace {

// Multiply-adds below which all images are matched by one thread.
constexpr int64_t kSerialProducts = 400 * 1000;
// The same for one image whose sources several threads would share: they wait for each other twice.
constexpr int64_t kSerialImage = 4 * 1000 * 1000;

// What scores elements of a type.
template <class T>
struct ScoresOf {
  using Type = VectorScores<T>;
};
#if defined(__AMX_BF16__)
template <>
struct ScoresOf<BFloat16> {
  using Type = TileScores;
};
#endif

// Room for the match of one image.
template <class Scores>
Match prepare(const MatchProblem& a, const Image& image) {
  Match p;
  p.channels = a.channels;
  p.sources = image.partition.num_src;
  p.destinations = std::max(image.partition.num_dst - image.partition.protected_dst, 0);
  p.panels = (p.destinations + kLanes - 1) / kLanes;
  const int64_t destinations = p.panels * kLanes, panels = p.panels * Scores::panel_size(p.channels);
  const int64_t sources = round_up(p.sources, kLanes);  // keeps what follows aligned

  thread_local Scratch scratch;
  p.destination = scratch.take(panels + destinations + 7 * sources);
  p.inverse_dst = p.destination + panels;
  p.score = p.inverse_dst + destinations;
  p.partner = reinterpret_cast<int32_t*>(p.score + sources);
  p.rank = p.partner + sources;
  p.keys = reinterpret_cast<uint64_t*>(p.rank + sources);
  return p;
}

template <class T>
Match match_image(const MatchProblem& a, const Image& image, bool parallel) {
  using Scores = typename ScoresOf<T>::Type;
  const Match p = prepare<Scores>(a, image);
  const int32_t first_number = p.destinations > 0 ? image.partition.protected_dst : 0;
  std::atomic<int64_t> loaded{0};
  Failure failure;
#pragma omp parallel if (parallel)
  {
    thread_local Scratch scratch;
    float* memory = nullptr;  // a thread without memory takes its turns, and does nothing in them
    failure.guard([&] { memory = scratch.take(Scores::pass_size(p.channels)); });
    // No barrier, and no fixed share for a thread: the system can take milliseconds to wake a thread, and the others
    // would wait. Threads wait only for panels that are being loaded.
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t panel = 0; panel < p.panels; ++panel) {
      if (memory) Scores::load_panel(a, image, p, panel, memory);
      loaded.fetch_add(1, std::memory_order_release);
    }
    while (loaded.load(std::memory_order_acquire) < p.panels) std::this_thread::yield();
    [[maybe_unused]] const typename Scores::Means means;
#pragma omp for schedule(dynamic, 1)
    for (int64_t from = 0; from < p.sources; from += kPassSources) {
      if (!memory) continue;
      Best best[kPassSources];
      Scores::best_of_pass(a, image, p, from, memory, best);
      for (int64_t i = from; i < std::min(from + kPassSources, p.sources); ++i) {
        best_of_lanes(best[i - from], p.score[i], p.partner[i]);
        p.partner[i] += first_number;
      }
    }
  }
  failure.rethrow();
  return p;
}

// Matches every image, and hands each to `finish`: over the threads by image, or, of fewer images, inside each.
template <class Finish>
void match_images(const MatchProblem& a, Finish&& finish) {
  with_element(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t products = int64_t{a.partition.num_src} * a.partition.num_dst * a.channels;
#ifdef _OPENMP
    const int threads = omp_get_max_threads();
#else
    const int threads = 1;
#endif
    const bool by_image = a.images >= threads;
    const bool parallel =
        by_image ? products * a.images > kSerialProducts : products > kSerialImage * ScoresOf<T>::Type::kSpeed;
    const auto match = [&](int64_t b, bool inside) {
      const Image image = image_of(a, b);
      finish(image, match_image<T>(a, image, inside));
    };
    // Two loops, not one with an `if` clause: a parallel region inside another, even one of a single thread, does not
    // get the pool's threads but new ones at every call.
    if (by_image && parallel) {
      for_each_dynamic(a.images, [&](int64_t b) { match(b, false); });
    } else {
      for (int64_t b = 0; b < a.images; ++b) match(b, parallel);
    }
  });
}

// The rank of each source by its score; kNoRank of those that are protected.
void rank_sources(const Partition& p, const Match& match, int32_t* rank) {
  const int32_t lead = std::min(p.protected_src, p.num_src), candidates = p.num_src - lead;
  for (int32_t i = 0; i < candidates; ++i) match.keys[i] = pack_candidate(match.score[lead + i], lead + i);
  const uint64_t* sorted = sort_candidates(match.keys, candidates, match.keys + candidates);
  std::fill(rank, rank + lead, kNoRank);
  for (int32_t place = 0; place < candidates; ++place) rank[candidate_index(sorted[place])] = place;
}

}  // namespace
}  // namespace tokred::cpu::TOKRED_ISA
