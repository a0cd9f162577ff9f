// Operands on their way into panels: as they are, as a gradient that is formed while it is packed, or as the value of
// an activation. Used by gemm.cpp. Owns no memory; arithmetic is behind the table.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "parallel.h"

namespace fastmlp::cpu {

// Rows of a gradient that are formed at once when the batch runs along k: a staging block of this
// many rows of mc values stays in the L1 cache.
constexpr int64_t staged_k = 16;

// n values that lie `stride` apart, as a gapless run: themselves, or copied to `buffer`.
template <class S> const S* gapless(const S* source, int64_t stride, int64_t n, S* buffer) {
  if (stride == 1) return source;
  for (int64_t i = 0; i < n; i++) buffer[i] = source[i * stride];
  return buffer;
}

// `count` runs of n values: at(r) of the operand, `step` from one run to the next, `inner` from one value to the next.
struct Runs {
  int64_t count, n;
  int64_t at, step, inner;
  int64_t saved_at, saved_step, saved_inner;
};

// Runs of the operand as it enters the product, gapless one after another in out.
template <class S> void form(const Kernels<S>& kernels, const Operand<S>& x, Runs runs, S* buffer, S* out) {
  const ActivationKernels<S>& act = kernels.activations[x.activation.kind];
  const bool gradient = x.form == Form::gradient;
  const auto adjacent = [&](int64_t step, int64_t inner) { return inner == 1 && step == runs.n; };
  if (adjacent(runs.step, runs.inner) && (!gradient || adjacent(runs.saved_step, runs.saved_inner))) {
    runs.n *= runs.count;
    runs.count = 1;
  }
  for (int64_t r = 0; r < runs.count; r++, out += runs.n) {
    const S* data = gapless(x.data + runs.at + r * runs.step, runs.inner, runs.n, buffer);
    if (gradient) {
      const S* saved =
          gapless(x.saved + runs.saved_at + r * runs.saved_step, runs.saved_inner, runs.n, buffer + runs.n);
      act.gradient(runs.n, data, saved, out, x.activation.scalars);
    } else {
      act.value(runs.n, data, out, x.activation.scalars);
    }
  }
}

// Packs rows `i` of A (or columns of B) times range `p` of k into panels `width` wide. What is formed on the way
// stands in `staging`; `run` holds two runs.
template <class S, class Pack>
void pack_block(const Kernels<S>& kernels, const Operand<S>& x, Range i, Range p, int64_t width, Pack pack, S* staging,
                S* run, Compute<S>* panels) {
  const int64_t k = p.size(), units = kernels.units(k);
  if (x.form == Form::plain) {
    // Rows of the operand that run across k are read whole, a few at a time.
    const int64_t step = x.stride == 1 ? staged_k : k;
    for (int64_t q = p.begin; q < p.end; q += step) {
      for (int64_t j = i.begin; j < i.end; j += width) {
        pack(x.data + j * x.stride + q * x.k_stride, x.stride, x.k_stride, std::min(width, i.end - j),
             std::min(step, p.end - q), panels + (j - i.begin) * units + kernels.units(q - p.begin) * width);
      }
    }
  } else if (x.stride == 1) {
    // Runs across k: form a few rows of the block at a time, then deal them out to the panels.
    const int64_t n = i.size();
    for (int64_t q = p.begin; q < p.end; q += staged_k) {
      const int64_t count = std::min(staged_k, p.end - q);
      form(kernels, x,
           {count, n, i.begin + q * x.k_stride, x.k_stride, 1, i.begin * x.saved_stride + q * x.saved_k_stride,
            x.saved_k_stride, x.saved_stride},
           run, staging);
      for (int64_t j = 0; j < n; j += width) {
        pack(staging + j, 1, n, std::min(width, n - j), count, panels + j * units + kernels.units(q - p.begin) * width);
      }
    }
  } else {
    for (int64_t j = i.begin; j < i.end; j += width) {
      const int64_t count = std::min(width, i.end - j);
      form(kernels, x,
           {count, k, j * x.stride + p.begin * x.k_stride, x.stride, x.k_stride,
            j * x.saved_stride + p.begin * x.saved_k_stride, x.saved_stride, x.saved_k_stride},
           run, staging);
      pack(staging, k, 1, count, k, panels + (j - i.begin) * units);
    }
  }
}

template <class S> void load_bias(const Kernels<S>& kernels, const Vector& bias, Range n, Compute<S>* out) {
  const S* source = static_cast<const S*>(bias.data) + n.begin * bias.stride;
  if (bias.stride == 1) {
    kernels.widen(n.size(), source, out);
  } else {
    for (int64_t j = 0; j < n.size(); j++) kernels.widen(1, source + j * bias.stride, out + j);
  }
}

}  // namespace fastmlp::cpu
