// Scratch memory of one call: an aligned block from a cache that belongs to the calling thread. Everything in cpu takes
// its scratch before it starts threads, so that running out of memory throws in the caller and nowhere else. Also
// advises the system on large blocks that others own, which register.cpp does for results.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../contract/carver.h"

namespace fastmlp::cpu {

// At most this much stays with a thread between calls; larger blocks are freed at once.
constexpr size_t workspace_kept_bytes = size_t(16) << 20;
constexpr size_t cache_line = 64;

// Asks the system for huge pages where memory that was not touched yet holds whole ones. Each page that is touched
// first costs a fault, a microsecond or, on a virtual machine, ten: for a result of 16 MiB 4096 of them, or 8.
void prefer_huge_pages(void* data, size_t bytes);

class Workspace {
 public:
  // Throws std::bad_alloc. Contents are not initialised.
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  char* data() const { return data_; }

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
};

using Carver = CarverOf<cache_line>;

}  // namespace fastmlp::cpu
