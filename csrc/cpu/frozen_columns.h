// A frozen network whose activations are columns, in panels of NR rows like those of B: weights are A, and vectors hold
// rows, so that narrow layers fill them too, if there are rows enough. Adds the same products in the same order as
// FrozenRows, hence with the same bits. Called by frozen.cpp. Allocates nothing and starts no thread.
#pragma once

#include <algorithm>

#include "frozen_form.h"
#include "frozen_rows.h"

namespace fastmlp::cpu {

template <class S> class FrozenColumns : FrozenForm<S> {
  using C = Compute<S>;
  using FrozenForm<S>::kernels, FrozenForm<S>::nr, FrozenForm<S>::layers, FrozenForm<S>::float32_ends;
  using FrozenForm<S>::end_size, FrozenForm<S>::readable, FrozenForm<S>::stage, FrozenForm<S>::rows_after,
      FrozenForm<S>::finish;

  // What the activations of a block may take in a layer.
  static constexpr int64_t block_bytes = 28 << 10;
  // Tiles of weights are less tall than those of rows, and so each of their products takes longer. Turning a vector of
  // the input takes as long as so many products.
  static constexpr double tile_cost = 1.03, transposition_cost = 0.5;

 public:
  FrozenColumns(const KernelTable& table, const PackedLayers<S>& layers, bool float32_ends, const FrozenRows<S>& rows)
      : FrozenForm<S>(table, layers, float32_ends), rows(rows) {}

  // For one row, in products of vectors, if all vectors are full.
  double cost() const {
    double sum = 0;
    for (size_t l = 0; l < layers.size(); l++) sum += double(layers[l].units * layers[l].n) * tile_cost;
    return sum + double(kernels.units(layers.in_features()) * kernels.lanes) * transposition_cost;
  }

  int64_t block_rows() const {
    const int64_t bytes = std::max<int64_t>(1, layers.widest()) * int64_t(sizeof(C));
    return std::max<int64_t>(1, block_bytes / bytes / nr) * nr;
  }

  FrozenScratch<S> carve(Carver& carver, int64_t rows) const {
    const int64_t widest = layers.widest();
    FrozenScratch<S> scratch{};
    scratch.staging = carver.take<S>(nr * layers.in_features());
    for (S*& place : scratch.values) place = carver.take<S>(rows * round_up(widest, kernels.k_unit));
    scratch.units = in_itself<S> ? nullptr : carver.take<C>(rows * kernels.units(widest));
    scratch.sums = carver.take<C>(std::max(rows, std::max(nr, most_panels * kernels.mr)) * nr);
    scratch.last = carver.take<C>(rows * kernels.lanes);
    return scratch;
  }

  // Takes rows `range` of the input through all layers.
  void run(const InputRows& input, Range range, void* output, const FrozenScratch<S>& scratch) const {
    Ahead ahead = rows_after(input, range);
    const int64_t m = range.size(), panels = ceil_divide(m, nr);
    const C* x = pack_input(input, range, scratch);
    for (size_t l = 0; l < layers.size(); l++) {
      const bool last = l + 1 == layers.size();
      const PackedLayer<S>& layer = layers[l];
      if (last) {
        char* const out = static_cast<char*>(output) + range.begin * layer.n * end_size();
        return last_layer(layer, m, x, out, scratch, ahead);
      }
      S* const out = scratch.values[l % 2];
      run_layer(layer, round_up(m, kernels.lanes), x, out, layer.n * nr, false, scratch.sums, ahead);
      if constexpr (in_itself<S>) {
        x = out;
      } else {
        for (int64_t p = 0; p < panels; p++) {
          kernels.pack_b(out + p * layer.n * nr, 1, nr, nr, layer.n, scratch.units + p * kernels.units(layer.n) * nr);
        }
        x = scratch.units;
      }
    }
  }

 private:
  // Turns rows of the input into panels, and returns these.
  const C* pack_input(const InputRows& input, Range range, const FrozenScratch<S>& scratch) const {
    const int64_t k = layers.in_features();
    C* first = scratch.units;
    if constexpr (in_itself<S>) first = scratch.values[1];  // because the first layer writes values[0]
    const bool in_place = readable(input);
    for (int64_t p = 0; p < ceil_divide(range.size(), nr); p++) {
      const Range rows{range.begin + p * nr, std::min(range.end, range.begin + (p + 1) * nr)};
      const S* x = scratch.staging;
      int64_t step = k, element_step = 1;
      if (in_place) {
        x = reinterpret_cast<const S*>(input.row(rows.begin));
        step = input.step() / int64_t(sizeof(S));
        element_step = input.element_step() / int64_t(sizeof(S));
      } else {
        stage(input, rows, k, scratch.staging);
      }
      kernels.pack_b(x, step, element_step, rows.size(), k, first + p * kernels.units(k) * nr);
    }
    return first;
  }

  // The last layer, whose output is rows again: as the result of products, or by copying, if vectors of features would
  // be mostly empty.
  void last_layer(const PackedLayer<S>& layer, int64_t m, const C* x, char* out, const FrozenScratch<S>& scratch,
                  Ahead& ahead) const {
    if (layer.n >= kernels.lanes) {
      for (int64_t from = 0; from < m; from += nr) {
        const int64_t count = std::min(nr, m - from);
        rows.run_layer(layer, count, x + from * layer.units, 1, nr, out + from * layer.n * end_size(), layer.n,
                       float32_ends, scratch.sums, ahead);
      }
    } else if (layer.n == 1) {
      run_layer(layer, m, x, out, nr, float32_ends, scratch.sums, ahead);
    } else {
      run_layer(layer, round_up(m, kernels.lanes), x, scratch.last, layer.n * nr, float32_ends, scratch.sums, ahead);
      if (float32_ends) {
        turn(scratch.last, layer.n, m, reinterpret_cast<C*>(out));
      } else {
        turn(reinterpret_cast<const S*>(scratch.last), layer.n, m, reinterpret_cast<S*>(out));
      }
    }
  }

  // Copies panels of n features of m rows to rows.
  template <class T> void turn(const T* from, int64_t n, int64_t m, T* out) const {
    for (int64_t panel = 0; panel < m; panel += nr, from += n * nr) {
      const int64_t rows = std::min(nr, m - panel);
      for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < n; j++) *out++ = from[j * nr + i];
      }
    }
  }

  // One layer. x is panels of [units, NR]; out is panels of [n, NR], out_panel apart, of which the first m columns are
  // written.
  void run_layer(const PackedLayer<S>& layer, int64_t m, const C* x, void* out, int64_t out_panel, bool float32_out,
                 C* sums, Ahead& input) const {
    PanelTile<S> t;
    t.a_step = 1;
    t.a_unit = nr;
    t.b_panel = layer.units * nr;
    t.sums_step = round_up(m, nr);
    t.bias = nullptr;
    t.relu = is_relu(layer.activation);
    t.output_step = nr;
    t.output_panel = out_panel;
    input.spread(layer.units * ceil_divide(layer.n, kernels.mr) * ceil_divide(m, nr));
    t.input_step = input.step();
    for (int64_t j = 0; j < layer.n; j += nr) {
      const int64_t features = std::min(nr, layer.n - j), tiles = ceil_divide(features, kernels.mr);
      const int64_t wide = kernels.panels_side_by_side[ceil_divide(features, tiles) - 1] * nr;
      for (int64_t from = 0, end; from == 0 || from < layer.units; from = end) {
        end = std::min(from + layer.step, layer.units);
        t.units = end - from;
        t.add = from > 0;
        const bool complete = end == layer.units;
        const bool direct = complete && !needs_epilogue(layer.activation) && !float32_out;
        Ahead weights =
            layers.weights_after(layer.panels + j * layer.units + end * nr, t.units, tiles * ceil_divide(m, wide));
        t.weights_step = weights.step();
        for (int64_t g = 0; g < m; g += wide) {
          t.columns = std::min(wide, m - g);
          t.b = x + g * layer.units + from * nr;
          for (int64_t i = 0; i < tiles; i++) {
            const Range rows = part_of(features, 1, i, tiles);
            const int64_t feature = j + rows.begin, at = g / nr * out_panel + feature * nr;
            t.a = layer.panels + j * layer.units + from * nr + rows.begin;
            t.weights_ahead = weights.next(t.units);
            t.input_ahead = input.next(t.units);
            t.row_bias = complete && layer.bias ? layer.bias + feature : nullptr;
            t.sums = sums + rows.begin * t.sums_step + g;
            t.output = direct ? static_cast<S*>(out) + at : nullptr;
            kernels.panel_kernel(rows.size(), t.columns)(t);
            if (!complete || direct) continue;
            for (int64_t p = 0; p < t.columns; p += nr) {
              finish(layer, t.sums + p, t.sums_step, rows.size(), std::min(nr, t.columns - p), out,
                     at + p / nr * out_panel, nr, float32_out);
            }
          }
        }
        if (complete) break;
      }
    }
  }

  const FrozenRows<S>& rows;  // for the last layer
};

}  // namespace fastmlp::cpu
