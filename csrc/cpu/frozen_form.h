// What rows and columns of a frozen network share: how the input is read, and what follows the products of a tile. Base
// of FrozenRows and FrozenColumns. Owns no memory, and leaves all arithmetic to the kernels of the table.
#pragma once

#include <algorithm>
#include <cstring>

#include "ahead.h"
#include "epilogue.h"
#include "frozen.h"
#include "frozen_layers.h"

namespace fastmlp::cpu {

// How far apart rows of n values lie in scratch. Rows that are a multiple of 1024 bytes apart would share the same few
// lines of an L1 cache.
template <class T> int64_t row_step(int64_t n) {
  const int64_t line = line_bytes / int64_t(sizeof(T));
  const int64_t step = round_up(std::max<int64_t>(n, 1), line);
  return step * int64_t(sizeof(T)) % 1024 == 0 ? step + line : step;
}

// Memory of one thread.
template <class S> struct FrozenScratch {
  S* staging;         // rows of an input that cannot be read as it lies
  S* values[2];       // activations, which layers write by turns
  Compute<S>* units;  // activations as the kernels multiply them, unless they are so already
  Compute<S>* sums;   // of tiles
  Compute<S>* last;   // the output as columns
};

template <class S> class FrozenForm {
 public:
  FrozenForm(const KernelTable& table, const PackedLayers<S>& layers, bool float32_ends)
      : kernels(kernels_of<S>(table)),
        nr(kernels.nr),
        layers(layers),
        float32_ends(float32_ends),
        ends(*table.float32) {}

 protected:
  using C = Compute<S>;

  // Of an element of the network's input and output.
  int64_t end_size() const { return float32_ends ? int64_t(sizeof(float)) : int64_t(sizeof(S)); }

  // Whether the input can be read as it lies, with steps that count elements.
  bool readable(const InputRows& input) const {
    constexpr int64_t size = sizeof(S);
    return !float32_ends && layers.in_features() > 0 && input.even() && input.step() % size == 0 &&
           input.element_step() % size == 0 && reinterpret_cast<uintptr_t>(input.row(0)) % size == 0;
  }

  // Copies rows of the input to `out`: without gaps, `step` apart, and converted if the ends are float32.
  void stage(const InputRows& input, Range rows, int64_t step, S* out) const {
    const int64_t k = layers.in_features();
    if (k == 0) return;  // there may be no memory to read
    for (int64_t i = rows.begin; i < rows.end; i++, out += step) {
      const char* from = input.row(i);
      if (float32_ends) {
        constexpr int64_t run = 64;
        C values[run];
        for (int64_t p = 0; p < k; p += run) {
          const int64_t count = std::min(run, k - p);
          gather(from + p * input.element_step(), input.element_step(), count, values);
          kernels.narrow(count, values, out + p);
        }
      } else {
        gather(from, input.element_step(), k, out);
      }
    }
  }

  // The rows of the input that follow a block, if they are gapless.
  Ahead rows_after(const InputRows& input, Range range) const {
    const int64_t bytes = layers.in_features() * end_size();
    const int64_t rows = std::min(range.size(), input.count() - range.end);
    if (rows <= 0 || !input.even() || input.step() != bytes || input.element_step() != end_size()) return {};
    const char* const begin = input.row(range.end);
    return {begin, begin + rows * bytes};
  }

  // Applies an activation to sums of a tile, and writes them `at` elements into `out`.
  void finish(const PackedLayer<S>& layer, const C* sums, int64_t sums_step, int64_t rows, int64_t columns, void* out,
              int64_t at, int64_t out_step, bool float32_out) const {
    if constexpr (same_type<S, BFloat16>) {
      if (float32_out) {
        return epilogue<float>(ends, layer, sums, sums_step, rows, columns, static_cast<float*>(out) + at, out_step);
      }
    }
    epilogue<S>(kernels, layer, sums, sums_step, rows, columns, static_cast<S*>(out) + at, out_step);
  }

  const Kernels<S>& kernels;
  const int64_t nr;
  const PackedLayers<S>& layers;
  const bool float32_ends;

 private:
  template <class T> static void gather(const char* from, int64_t step, int64_t count, T* out) {
    if (step == int64_t(sizeof(T))) {
      std::memcpy(out, from, size_t(count) * sizeof(T));
    } else {
      for (int64_t p = 0; p < count; p++) std::memcpy(out + p, from + p * step, sizeof(T));
    }
  }

  template <class T>
  static void epilogue(const Kernels<T>& kernels, const PackedLayer<S>& layer, const C* sums, int64_t sums_step,
                       int64_t rows, int64_t columns, T* out, int64_t out_step) {
    kernels.activations[layer.activation.kind].epilogue({
        .tile = sums,
        .tile_step = sums_step,
        .rows = rows,
        .columns = columns,
        .output = out,
        .leading_dimension = out_step,
        .scalars = layer.activation.scalars,
    });
  }

  const Kernels<float>& ends;  // which write float32
};

}  // namespace fastmlp::cpu
