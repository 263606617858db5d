// SPDX-License-Identifier: MIT
// Picks, once, the widest instruction set that this machine has and the build knows.
#if defined(TOKRED_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "ops.h"

// Every op that is compiled once per instruction set, with what it takes: those that have AMX tiles,
#define TOKRED_TILE_KERNELS(F)                            \
  F(bipartite_match, MatchArgs)                           \
  F(rank_candidates, BestMatchArgs)                       \
  F(token_attention, TokenAttentionArgs)                  \
  F(token_attention_backward, TokenAttentionBackwardArgs) \
  F(lookup_gather, LookupGatherArgs)                      \
  F(lookup_gather_backward, LookupGatherBackwardArgs)     \
  F(lookup_scatter, LookupScatterArgs)                    \
  F(lookup_scatter_backward, LookupScatterBackwardArgs)

// and all.
#define TOKRED_KERNELS(F)                    \
  TOKRED_TILE_KERNELS(F)                     \
  F(window_similarity, WindowSimilarityArgs) \
  F(merge, MergeArgs)                        \
  F(merge_backward, MergeBackwardArgs)       \
  F(unmerge, UnmergeArgs)

#define TOKRED_DECLARE(op, Args) void op(const Args&);
#define TOKRED_MEMBER(op, Args) void (*op)(const Args&);
#define TOKRED_ENTRY(op, Args) isa::op,
#define TOKRED_REPLACE(op, Args) set.op = amx::op;
#define TOKRED_CALL(op, Args) \
  void op(const Args& args) { kernels().op(args); }

namespace tokred::cpu {
struct Kernels {
  const char* name;
  TOKRED_KERNELS(TOKRED_MEMBER)
};
}  // namespace tokred::cpu

#define TOKRED_SET(isa_name)                          \
  namespace tokred::cpu::isa_name {                   \
  TOKRED_KERNELS(TOKRED_DECLARE)                      \
  }                                                   \
  namespace tokred::cpu {                             \
  inline Kernels isa_name##_kernels() {               \
    namespace isa = isa_name;                         \
    return {#isa_name, TOKRED_KERNELS(TOKRED_ENTRY)}; \
  }                                                   \
  }

TOKRED_SET(baseline)
#if defined(__x86_64__)
TOKRED_SET(avx2)
TOKRED_SET(avx512)
#endif
#if defined(TOKRED_AMX)
namespace tokred::cpu::amx {
TOKRED_TILE_KERNELS(TOKRED_DECLARE)
}
#endif

namespace tokred::cpu {
namespace {

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

#if defined(TOKRED_AMX)
// On Linux a process must request the AMX tiles, because their state is large.
bool has_amx() {
  constexpr int kRequestState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
         __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestState, kTileData) == 0;
}

Kernels amx_kernels() {
  Kernels set = avx512_kernels();
  set.name = "amx";
  TOKRED_TILE_KERNELS(TOKRED_REPLACE)
  return set;
}
#else
bool has_amx() { return false; }
#endif

Kernels choose() {
  // For tests and comparisons: the name of one instruction set.
  const char* wish = std::getenv("TOKRED_CPU_ISA");
  const auto fits = [&](const char* name, bool has) { return has && (!wish || !std::strcmp(wish, name)); };
#if defined(TOKRED_AMX)
  if (fits("amx", has_amx())) return amx_kernels();
#endif
#if defined(__x86_64__)
  if (fits("avx512", has_avx512())) return avx512_kernels();
  if (fits("avx2", has_avx2())) return avx2_kernels();
#endif
  if (fits("baseline", true)) return baseline_kernels();
  throw std::invalid_argument(std::string("TOKRED_CPU_ISA=") + wish + ": this machine and build have baseline" +
                              (has_avx2() ? ", avx2" : "") + (has_avx512() ? ", avx512" : "") +
                              (has_amx() ? ", amx" : ""));
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

TOKRED_KERNELS(TOKRED_CALL)
const char* instruction_set() { return kernels().name; }

}  // namespace tokred::cpu
