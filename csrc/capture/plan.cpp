// The greedy plan of plan.h. Called by tape.cpp.
#include "plan.h"

#include <algorithm>
#include <numeric>

namespace fastmlp {
namespace {

constexpr int64_t line = 64;  // bytes of a cache line, which the widest vectors of all instruction sets fill

int64_t rounded(int64_t bytes) { return (std::max<int64_t>(bytes, 1) + line - 1) / line * line; }

bool live_together(const Piece& a, const Piece& b) { return a.first <= b.last && b.first <= a.last; }

}  // namespace

ArenaPlan plan_arena(const std::vector<Piece>& pieces) {
  ArenaPlan plan;
  plan.offsets.assign(pieces.size(), 0);
  std::vector<size_t> order(pieces.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return pieces[a].bytes > pieces[b].bytes; });
  std::vector<size_t> placed;  // by offset
  for (const size_t i : order) {
    int64_t offset = 0;
    for (const size_t other : placed) {
      if (!live_together(pieces[i], pieces[other])) continue;
      if (offset + rounded(pieces[i].bytes) <= plan.offsets[other]) break;
      offset = std::max(offset, plan.offsets[other] + rounded(pieces[other].bytes));
    }
    plan.offsets[i] = offset;
    plan.bytes = std::max(plan.bytes, offset + rounded(pieces[i].bytes));
    const auto place = std::upper_bound(placed.begin(), placed.end(), offset,
                                        [&](int64_t value, size_t other) { return value < plan.offsets[other]; });
    placed.insert(place, i);
  }
  return plan;
}

}  // namespace fastmlp
