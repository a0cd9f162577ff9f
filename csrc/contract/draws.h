// The torch-free contract of random numbers: the generator whose state torch keeps on the host, and what is drawn from
// it. Filled by cpu/register.cpp, executed by cpu/draws.h.
#pragma once

#include "problem.h"

namespace fastmlp {

// Matsumoto and Nishimura, Mersenne Twister, 1998: MT19937.
struct Twister {
  static constexpr int size = 624;
  uint32_t words[size];
  int used;  // how many of the words have been drawn; the next one is tempered words[used], or of the block after these
};

// n numbers of 1 with probability p and 0 else, as torch's kernel for one thread draws them: of each 64 bits of the
// generator, the first word above the second, the lower 53 as a fraction, which is compared with p.
struct BernoulliDraw {
  enum class Element { float32, float64, byte };
  Element element = Element::float32;
  int64_t n = 0;
  void* output = nullptr;
  double p = 0;
};

}  // namespace fastmlp
