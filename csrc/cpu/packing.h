// Packs operands into panels: as they lie in memory, as a gradient, or as the value of an activation; the latter two
// are computed on the way. Called by gemm_packed.h, gemm_streamed.h and dots.h. Owns no memory, and leaves all
// arithmetic to the kernels of the table.
#pragma once

#include <algorithm>

#include "parallel.h"
#include "product.h"

namespace fastmlp::cpu {

// How many rows of an operand are read or computed at once where the operand runs across k. That many rows of MC values
// stay in the L1 cache.
constexpr int64_t staged_k = 16;

// n values that lie `stride` apart, as a gapless run: themselves, or copied to `buffer`.
template <class S> const S* as_run(const S* source, int64_t stride, int64_t n, S* buffer) {
  if (stride == 1) return source;
  for (int64_t i = 0; i < n; i++) buffer[i] = source[i * stride];
  return buffer;
}

// Where `count` runs of n values lie in an operand: `at` is the first value, `step` leads from one run to the next, and
// `inner` from one value to the next. Likewise for what the operand saved.
struct Runs {
  int64_t count, n;
  int64_t at, step, inner;
  int64_t saved_at, saved_step, saved_inner;
};

// Writes runs of the operand as they enter the product to `out`, gapless one after another. `buffer` holds two runs.
template <class S> void form(const Kernels<S>& kernels, const Operand<S>& x, Runs runs, S* buffer, S* out) {
  const ActivationKernels<S>& act = kernels.activations[x.activation.kind];
  const bool gradient = x.form == Form::gradient;
  const auto adjacent = [&](int64_t step, int64_t inner) { return inner == 1 && step == runs.n; };
  if (adjacent(runs.step, runs.inner) && (!gradient || adjacent(runs.saved_step, runs.saved_inner))) {
    runs.n *= runs.count;
    runs.count = 1;
  }
  for (int64_t r = 0; r < runs.count; r++, out += runs.n) {
    const S* data = as_run(x.data + runs.at + r * runs.step, runs.inner, runs.n, buffer);
    if (gradient) {
      const S* saved = as_run(x.saved + runs.saved_at + r * runs.saved_step, runs.saved_inner, runs.n, buffer + runs.n);
      act.gradient(runs.n, data, saved, out, x.activation.scalars);
    } else {
      act.value(runs.n, data, out, x.activation.scalars);
    }
  }
}

// Packs rows `i` of A (or columns of B) times range `p` of k into panels `width` wide. `staging` holds what is computed
// on the way, and `run` two runs.
template <class S, class Pack>
void pack_block(const Kernels<S>& kernels, const Operand<S>& x, Range i, Range p, int64_t width, Pack pack, S* staging,
                S* run, Compute<S>* panels) {
  const int64_t k = p.size(), units = kernels.units(k);
  if (x.form == Form::plain) {
    // An operand that runs across k is read in whole rows, a few at a time.
    const int64_t step = x.stride == 1 ? staged_k : k;
    for (int64_t q = p.begin; q < p.end; q += step) {
      for (int64_t j = i.begin; j < i.end; j += width) {
        pack(x.data + j * x.stride + q * x.k_stride, x.stride, x.k_stride, i.end - j, std::min(step, p.end - q),
             panels + (j - i.begin) * units + kernels.units(q - p.begin) * width);
      }
    }
  } else if (x.stride == 1) {
    // An operand that runs across k is computed a few rows at a time, which are then dealt out to the panels.
    const int64_t n = i.size();
    for (int64_t q = p.begin; q < p.end; q += staged_k) {
      const int64_t count = std::min(staged_k, p.end - q);
      form(kernels, x,
           {count, n, i.begin + q * x.k_stride, x.k_stride, 1, i.begin * x.saved_stride + q * x.saved_k_stride,
            x.saved_k_stride, x.saved_stride},
           run, staging);
      for (int64_t j = 0; j < n; j += width) {
        pack(staging + j, 1, n, n - j, count, panels + j * units + kernels.units(q - p.begin) * width);
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

// Columns n of the bias, as the epilogue reads them.
template <class S> void load_bias(const Kernels<S>& kernels, const Vector& bias, Range n, Compute<S>* out) {
  const S* source = static_cast<const S*>(bias.data) + n.begin * bias.stride;
  if (bias.stride == 1) {
    kernels.widen(n.size(), source, out);
  } else {
    for (int64_t j = 0; j < n.size(); j++) kernels.widen(1, source + j * bias.stride, out + j);
  }
}

}  // namespace fastmlp::cpu
