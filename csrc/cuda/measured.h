// The choices of tiles that were measured in this process or read from a file; product_plan.cuh prefers them to its
// costs. Any number of threads may use them. Kept by register.cpp, which measures (tuning.h) and knows the file's form.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <optional>

#include "products.h"

namespace fastmlp::cuda {

// What was measured for products, and whether others are measured as they come.
class Measured {
 public:
  bool is_used() const { return measures_ || !empty_; }
  bool measures() const { return measures_; }
  // Returns what it was before.
  bool measure(bool measures) { return measures_.exchange(measures); }

  std::optional<TileSize> find(const ProductKey& key) {
    const std::lock_guard lock(mutex_);
    const auto found = choices_.find(key);
    return found == choices_.end() ? std::nullopt : std::optional(found->second);
  }

  void add(const ProductKey& key, TileSize tile) {
    const std::lock_guard lock(mutex_);
    choices_[key] = tile;
    empty_ = false;
  }

  std::map<ProductKey, TileSize> all() {
    const std::lock_guard lock(mutex_);
    return choices_;
  }

 private:
  std::atomic<bool> measures_{false}, empty_{true};
  std::mutex mutex_;
  std::map<ProductKey, TileSize> choices_;
};

}  // namespace fastmlp::cuda
