// Called through draws.h. Must stay baseline code: the numbers are made behind the table of the instruction set.
#include "draws.h"

#include <cmath>

#include "dispatch.h"

namespace fastmlp::cpu {

void draw(const BernoulliDraw& draw, Twister& generator) {
  const KernelTable& table = active();
  table.mark();
  // r 2^-53 < p for whole r: both sides times 2^53, which rounds nothing.
  const int64_t threshold = int64_t(std::ceil(std::ldexp(draw.p, 53)));
  switch (draw.element) {
    case BernoulliDraw::Element::float64:
      return table.float64->bernoulli(generator, threshold, draw.n, static_cast<double*>(draw.output));
    case BernoulliDraw::Element::float32:
      return table.float32->bernoulli(generator, threshold, draw.n, static_cast<float*>(draw.output));
    case BernoulliDraw::Element::byte:
      return table.float32->bernoulli_bytes(generator, threshold, draw.n, static_cast<uint8_t*>(draw.output));
  }
}

}  // namespace fastmlp::cpu
