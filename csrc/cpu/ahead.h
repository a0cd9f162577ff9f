// Prefetching for the tiles of frozen networks. Used by the frozen_*.h files; touches no memory itself.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "kernel_table.h"
#include "parallel.h"

namespace fastmlp::cpu {

// A range of memory that is used soon. Tiles prefetch it a little at a time while they compute, because a burst of
// prefetches would fill the core's queue and stop it.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* begin, const void* end)
      : next_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {}
  // Sets the step so that so many units of k suffice for all of it.
  void spread(int64_t units) {
    constexpr int64_t most = 2 * line_bytes;  // because the processor fetches lines in pairs
    step_ = std::clamp<int64_t>(ceil_divide(end_ - next_, std::max<int64_t>(1, units)), 1, most);
  }
  int64_t step() const { return step_; }
  // Where a tile of so many units begins to prefetch, or null if all was prefetched.
  const void* next(int64_t units) {
    if (next_ >= end_) return nullptr;
    return std::exchange(next_, next_ + units * step_);
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

}  // namespace fastmlp::cpu
