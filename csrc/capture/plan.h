// Where pieces of memory lie in one arena, planned by their lifetimes. Called by tape.cpp when a tape is finished. Must
// not know tensors: a piece is a size and the first and last of the steps that use it.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmlp {

struct Piece {
  int64_t bytes;
  int first, last;  // steps, both included
};

struct ArenaPlan {
  std::vector<int64_t> offsets;  // one a piece, multiples of a cache line
  int64_t bytes = 0;             // of the arena
};

// Pieces whose lifetimes overlap lie apart. Greedy: the largest first, each at the lowest place that is free for all
// of its life.
ArenaPlan plan_arena(const std::vector<Piece>& pieces);

}  // namespace fastmlp
