// SPDX-License-Identifier: MIT
// Picks, once, the widest instruction set that this machine has and the build knows.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

#define TOKRED_DECLARE(isa)                            \
  namespace tokred::cpu::isa {                         \
  void bipartite_match(const MatchArgs&);              \
  void best_match(const BestMatchArgs&);               \
  void window_similarity(const WindowSimilarityArgs&); \
  void merge(const MergeArgs&);                        \
  void merge_backward(const MergeBackwardArgs&);       \
  void unmerge(const UnmergeArgs&);                    \
  }
#define TOKRED_TABLE(isa) \
  {#isa, isa::bipartite_match, isa::best_match, isa::window_similarity, isa::merge, isa::merge_backward, isa::unmerge}

TOKRED_DECLARE(baseline)
#if defined(__x86_64__)
TOKRED_DECLARE(avx2)
TOKRED_DECLARE(avx512)
#endif

namespace tokred::cpu {
namespace {

struct Kernels {
  const char* name;
  void (*bipartite_match)(const MatchArgs&);
  void (*best_match)(const BestMatchArgs&);
  void (*window_similarity)(const WindowSimilarityArgs&);
  void (*merge)(const MergeArgs&);
  void (*merge_backward)(const MergeBackwardArgs&);
  void (*unmerge)(const UnmergeArgs&);
};

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Kernels choose() {
  // For tests and comparisons: the name of one instruction set.
  const char* wish = std::getenv("TOKRED_CPU_ISA");
  const auto fits = [&](const char* name, bool has) { return has && (!wish || !std::strcmp(wish, name)); };
#if defined(__x86_64__)
  if (fits("avx512", has_avx512())) return TOKRED_TABLE(avx512);
  if (fits("avx2", has_avx2())) return TOKRED_TABLE(avx2);
#endif
  if (fits("baseline", true)) return TOKRED_TABLE(baseline);
  throw std::invalid_argument(std::string("TOKRED_CPU_ISA=") + wish + ": this machine and build have baseline" +
                              (has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : ""));
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void bipartite_match(const MatchArgs& args) { kernels().bipartite_match(args); }
void best_match(const BestMatchArgs& args) { kernels().best_match(args); }
void window_similarity(const WindowSimilarityArgs& args) { kernels().window_similarity(args); }
void merge(const MergeArgs& args) { kernels().merge(args); }
void merge_backward(const MergeBackwardArgs& args) { kernels().merge_backward(args); }
void unmerge(const UnmergeArgs& args) { kernels().unmerge(args); }
const char* instruction_set() { return kernels().name; }

}  // namespace tokred::cpu
