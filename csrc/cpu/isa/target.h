// Included first by every file of isa/: the system headers and contracts that its target region
// must not compile again, and the pragma that opens one. A region lasts to the end of its file.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../tiles.h"

#define FASTMLP_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTMLP_TARGET(features) \
  FASTMLP_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define FASTMLP_TARGET_END FASTMLP_PRAGMA(clang attribute pop)
#else
#define FASTMLP_TARGET(features) FASTMLP_PRAGMA(GCC target(features))
#define FASTMLP_TARGET_END
#endif
