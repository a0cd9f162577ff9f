// What the operating system says of the caches of the processor that runs. Read by dispatch.cpp, which fits the blocks
// of products to them. Results must not depend on it: only how many rows go together may.
#pragma once

#include <cstdint>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace fastmlp::cpu {

// The bytes of one core's L2 cache, or 0 where the system does not tell.
inline int64_t l2_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes > 0 ? bytes : 0;
#else
  return 0;
#endif
}

}  // namespace fastmlp::cpu
