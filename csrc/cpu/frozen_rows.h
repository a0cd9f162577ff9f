// A frozen network whose activations are rows: they are A and the weights are B, so that vectors hold features, and few
// rows cost little. Called by frozen.cpp, and by frozen_columns.h for the last layer. Allocates nothing and starts no
// thread.
#pragma once

#include <algorithm>
#include <cstring>

#include "frozen_form.h"

namespace fastmlp::cpu {

template <class S> class FrozenRows : FrozenForm<S> {
  using C = Compute<S>;
  using FrozenForm<S>::kernels, FrozenForm<S>::nr, FrozenForm<S>::layers, FrozenForm<S>::float32_ends;
  using FrozenForm<S>::end_size, FrozenForm<S>::readable, FrozenForm<S>::stage, FrozenForm<S>::rows_after,
      FrozenForm<S>::finish;

  // What the activations of a block may take in a layer.
  static constexpr int64_t block_bytes = 64 << 10;
  static constexpr int64_t fewest_rows = 112, most_rows = 192;

 public:
  using FrozenForm<S>::FrozenForm;

  // For one row, in products of vectors.
  double cost() const {
    double sum = 0;
    for (size_t l = 0; l < layers.size(); l++) sum += double(layers[l].units * round_up(layers[l].n, kernels.lanes));
    return sum;
  }

  int64_t block_rows() const {
    return std::clamp(block_bytes / (std::max<int64_t>(1, layers.widest()) * int64_t(sizeof(C))), fewest_rows,
                      most_rows);
  }

  FrozenScratch<S> carve(Carver& carver, int64_t rows) const {
    FrozenScratch<S> scratch{};
    scratch.staging = carver.take<S>(rows * values_step(layers.in_features()));
    for (S*& place : scratch.values) place = carver.take<S>(rows * values_step(layers.widest()));
    scratch.units = in_itself<S> ? nullptr : carver.take<C>(rows * units_step(layers.widest()));
    scratch.sums = carver.take<C>(std::max(rows, std::max(nr, most_panels * kernels.mr)) * nr);
    return scratch;
  }

  // Takes rows `range` of the input through all layers.
  void run(const InputRows& input, Range range, void* output, const FrozenScratch<S>& scratch) const {
    Ahead ahead = rows_after(input, range);
    const int64_t m = range.size(), k = layers.in_features();
    const S* x = nullptr;
    int64_t step = 0;
    const bool thrashes = m > 4 && input.step() % 1024 == 0 && input.step() != 0;
    if (readable(input) && input.element_step() == int64_t(sizeof(S)) && !thrashes) {
      x = reinterpret_cast<const S*>(input.row(range.begin));
      step = input.step() / int64_t(sizeof(S));
    } else {
      step = values_step(k);
      stage(input, range, step, scratch.staging);
      x = scratch.staging;
    }
    for (size_t l = 0; l < layers.size(); l++) {
      const bool last = l + 1 == layers.size();
      const PackedLayer<S>& layer = layers[l];
      const C* a = nullptr;
      int64_t a_step = step;
      if constexpr (in_itself<S>) {
        a = x;
      } else {
        a_step = units_step(layer.k);
        for (int64_t i = 0; i < m; i++) to_units(x + i * step, layer.k, scratch.units + i * a_step);
        a = scratch.units;
      }
      step = last ? layer.n : values_step(layer.n);
      S* const values = scratch.values[l % 2];
      void* out = values;
      if (last) out = static_cast<char*>(output) + range.begin * layer.n * end_size();
      run_layer(layer, m, a, a_step, 1, out, step, last && float32_ends, scratch.sums, ahead);
      x = values;
    }
  }

  // One layer. a is [m, units], at steps a_step and a_unit; out is [m, n], with rows out_step apart.
  void run_layer(const PackedLayer<S>& layer, int64_t m, const C* a, int64_t a_step, int64_t a_unit, void* out,
                 int64_t out_step, bool float32_out, C* sums, Ahead& input) const {
    const int64_t tiles = ceil_divide(m, kernels.mr);
    const int64_t wide = kernels.panels_side_by_side[ceil_divide(m, tiles) - 1] * nr;
    PanelTile<S> t;
    t.a_step = a_step;
    t.a_unit = a_unit;
    t.b_panel = layer.units * nr;
    t.sums_step = wide;
    t.row_bias = nullptr;
    t.relu = is_relu(layer.activation);
    t.output_step = out_step;
    t.output_panel = nr;
    input.spread(layer.units * tiles * ceil_divide(layer.n, wide));
    t.input_step = input.step();
    for (int64_t j = 0; j < layer.n; j += wide) {
      t.columns = std::min(wide, layer.n - j);
      for (int64_t from = 0, end; from == 0 || from < layer.units; from = end) {
        end = std::min(from + layer.step, layer.units);
        t.units = end - from;
        t.b = layer.panels + j * layer.units + from * nr;
        t.add = from > 0;
        const bool complete = end == layer.units;
        t.bias = complete && layer.bias ? layer.bias + j : nullptr;
        const bool direct = complete && !needs_epilogue(layer.activation) && !float32_out;
        Ahead weights = layers.weights_after(t.b + t.units * nr, t.units, tiles);
        t.weights_step = weights.step();
        for (int64_t i = 0; i < tiles; i++) {
          const Range rows = part_of(m, 1, i, tiles);
          t.a = a + rows.begin * a_step + from * a_unit;
          t.weights_ahead = weights.next(t.units);
          t.input_ahead = input.next(t.units);
          t.sums = sums + rows.begin * wide;
          const int64_t at = rows.begin * out_step + j;
          t.output = direct ? static_cast<S*>(out) + at : nullptr;
          kernels.panel_kernel(rows.size(), t.columns)(t);
          if (complete && !direct) {
            finish(layer, t.sums, wide, rows.size(), t.columns, out, at, out_step, float32_out);
          }
        }
        if (complete) break;
      }
    }
  }

 private:
  int64_t values_step(int64_t n) const { return row_step<S>(n); }
  int64_t units_step(int64_t k) const { return row_step<C>(kernels.units(k)); }

  void to_units(const S* row, int64_t k, C* out) const {
    if (kernels.k_unit == 1) return kernels.widen(k, row, out);
    if (k % kernels.k_unit != 0) out[k / kernels.k_unit] = C(0);
    std::memcpy(out, row, size_t(k) * sizeof(S));
  }
};

}  // namespace fastmlp::cpu
