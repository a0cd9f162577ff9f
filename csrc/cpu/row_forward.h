// Forward of narrow layers: each block of rows goes through all of them, and what lies between them stays in a cache.
// Used by row_blocks.cpp, for forward passes and for training steps. Weights are packed once for all blocks;
// activations are row-major in memory and never packed, because the row kernels read A where it lies.
#pragma once

#include <algorithm>
#include <vector>

#include "dots.h"
#include "row_product.h"
#include "row_shape.h"
#include "workspace.h"

namespace fastmlp::cpu {

template <class S> class RowForward {
 public:
  RowForward(const KernelTable& table, const Network& network, const Layers& layers, const Matrix& input, int64_t rows,
             const Place<S>* places)
      : table(table),
        kernels(kernels_of<S>(table)),
        network(network),
        layers(layers),
        input(input),
        rows(rows),
        places(places),
        width(widest(network, layers)),
        block(block_rows<S>(network, layers, rows)),
        copies_input(must_be_copied<S>(input)) {
    steps.reserve(layers.end - layers.first);
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const bool in_place = layer.weight.column_stride == 1;
      const bool dots = in_place && goes_by_dots(kernels, rows, layer.out_features, layer.in_features, true, true);
      steps.push_back({dots, nullptr, nullptr});
    }
  }

  void run(int threads) {
    Carver measure;
    carve_shared(measure);
    Carver own;
    carve_own(own);
    const int64_t blocks = ceil_divide(rows, block);
    threads = int(std::min<int64_t>(useful_threads(multiply_adds(network, layers, rows), threads), blocks));
    const Workspace workspace(measure.used() + size_t(threads) * own.used());
    Carver shared(workspace.data());
    carve_shared(shared);
    prepare();
    run_tasks(blocks, threads, [&](int64_t b, int slot) {
      Carver carver(workspace.data() + measure.used() + size_t(slot) * own.used());
      table.mark();
      run_block(part_of(rows, 1, b, blocks), carve_own(carver));
    });
  }

  // Memory of one thread.
  struct Own {
    S *tile, *dot_bias, *input;
    S* hidden[2];
    Place<S>* places;  // where each layer writes the block
  };

  // What follows is `run` in parts, for train_blocks, which runs the blocks itself: memory for all threads, memory of
  // one thread, what has to be done once before any block, and a block.

  void carve_shared(Carver& carver) {
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      Step& step = steps[l - layers.first];
      if (step.dots) continue;
      step.panels = carver.take<S>(panels_size(kernels, layer.out_features, layer.in_features));
      step.bias = layer.bias.data ? carver.take<S>(round_up(layer.out_features, kernels.nr)) : nullptr;
    }
  }
  Own carve_own(Carver& carver) const {
    Own own;
    own.tile = carver.take<S>(kernels.mr * kernels.nr);
    own.dot_bias = carver.take<S>(dot_bias_size(kernels));
    own.input = copies_input ? carver.take<S>(block * network.layers[layers.first].in_features) : nullptr;
    for (S*& hidden : own.hidden) hidden = layers.end - layers.first > 1 ? carver.take<S>(block * width) : nullptr;
    own.places = carver.take<Place<S>>(int64_t(layers.end));
    return own;
  }

  void prepare() {
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const Step& step = steps[l - layers.first];
      if (step.dots) continue;
      pack_panels(kernels, layer.weight, layer.out_features, layer.in_features, true, step.panels);
      const S* bias = static_cast<const S*>(layer.bias.data);
      for (int64_t j = 0; bias && j < layer.out_features; j++) step.bias[j] = bias[j * layer.bias.stride];
    }
  }

  // Some rows of the input, as the kernels read them.
  Matrix input_of(Range range, const Own& own) const {
    if (copies_input) return copied(input, range, network.layers[layers.first].in_features, own.input);
    Matrix x = input;
    x.data = static_cast<S*>(input.data) + range.begin * input.row_stride;
    return x;
  }

  int64_t rows_of_block() const { return block; }

  // Takes the rows of the range, which x holds, through all layers, and writes to own.places.
  void run_rows(Matrix x, Range range, const Own& own) const {
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const Place<S>& place = own.places[l];
      S* const dropped = place.dropped ? place.dropped : own.hidden[l % 2];
      S* const output = place.output ? place.output : dropped;
      run_layer(layer, steps[l - layers.first], range.size(), x, output, place, own);
      if (layer.drops()) drop(kernels, layer, range, output, dropped);
      x = {layer.drops() ? dropped : output, layer.out_features, 1};
    }
  }

 private:
  // How a layer is computed.
  struct Step {
    bool dots;  // as inner products, of weights that are read as they lie
    S* panels;  // or from packed weights
    S* bias;    // padded to whole panels; null if there is none
  };

  void run_block(Range range, const Own& own) const {
    for (size_t l = layers.first; l < layers.end; l++) {
      const int64_t at = range.begin * network.layers[l].out_features;
      const auto here = [&](S* place) { return place ? place + at : nullptr; };
      own.places[l] = {here(places[l].output), here(places[l].pre_activation), here(places[l].dropped)};
    }
    run_rows(input_of(range, own), range, own);
  }

  void run_layer(const Layer& layer, const Step& step, int64_t m, const Matrix& x, S* output, const Place<S>& place,
                 const Own& own) const {
    if (step.dots) {
      Product<S> p;
      set_forward(p, layer, m, x, output, place.pre_activation);
      return multiply_by_dots(kernels, p, {0, m}, {0, p.n}, p.a, p.b, own.tile, own.dot_bias);
    }
    RowProduct<S> p;
    p.m = m;
    p.n = layer.out_features;
    p.k = layer.in_features;
    p.a = static_cast<const S*>(x.data);
    p.a_step = x.row_stride;
    p.a_k_step = 1;
    p.b = step.panels;
    p.b_panel = layer.in_features * kernels.nr;
    p.b_step = kernels.nr;
    p.b_padded = true;
    p.output = output;
    p.output_step = layer.out_features;
    p.pre_activation = place.pre_activation;
    p.bias = step.bias;
    p.fresh_a = &layer == &network.layers[layers.first] && x.row_stride == layer.in_features;
    p.fresh_output = place.output != nullptr;
    p.activation = layer.activation;
    multiply_rows(kernels, p, own.tile);
  }

  const KernelTable& table;
  const Kernels<S>& kernels;
  const Network& network;
  const Layers layers;
  const Matrix input;
  const int64_t rows;
  const Place<S>* const places;
  const int64_t width, block;
  const bool copies_input;
  std::vector<Step> steps;  // one for each layer
};

}  // namespace fastmlp::cpu
