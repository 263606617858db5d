// SPDX-License-Identifier: MIT
// The CPU ops. Each picks the widest instruction set the machine has, at run time.
#pragma once

#include "../common/args.h"

namespace tokred::cpu {

void bipartite_match(const MatchArgs& args);
void invert(const InvertArgs& args);
void compose(const ComposeArgs& args);
void merge(const MergeArgs& args);
void merge_backward(const MergeBackwardArgs& args);
void unmerge(const UnmergeArgs& args);
const char* instruction_set();

}  // namespace tokred::cpu
