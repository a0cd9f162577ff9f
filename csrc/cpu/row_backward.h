// Backward of narrow layers: the gradient of each block of rows goes down through all of them, and stays in a cache.
// Used by row_blocks.cpp, for backward passes and for training steps. Rows are cut into chunks by their number alone,
// and gradients of parameters are summed by chunk, so that their bits do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../contract/activation_info.h"
#include "gradient_sums.h"
#include "row_product.h"
#include "row_shape.h"
#include "workspace.h"

namespace fastmlp::cpu {

template <class S> class RowBackward {
 public:
  RowBackward(const KernelTable& table, const BackwardPass& pass, const Layers& layers, const Matrix& grad_output,
              S* grad_input)
      : table(table),
        kernels(kernels_of<S>(table)),
        pass(pass),
        network(pass.network),
        layers(layers),
        grad_output(grad_output),
        grad_input(grad_input),
        rows(network.rows),
        width(widest(network, layers)),
        block(block_rows<S>(network, layers, rows)),
        chunks(chunks_of_rows(rows)),
        copies_input(layers.first == 0 && must_be_copied<S>(network.input)),
        copies_grad(!is_gapless(grad_output, rows, network.layers[layers.end - 1].out_features)) {}

  void run(int threads) {
    run_blocks(threads, 0, [&](Range range, int64_t, const Own& own, char*) { return block_of(range, own); });
  }

  using Shared = std::vector<S*>;  // packed weights of each layer; null where they are read as they are
  // Memory of one thread.
  struct Own {
    S *tile, *input, *layer_input;
    S* grad[2];
    const S** saved;  // what each layer saved of the block
  };

  // The input of a block's first layer, and the gradient with respect to its last layer's output.
  struct Block {
    Matrix input;
    const S* grad;
  };

  // Runs all blocks. For each, prepare(rows, chunk, own, memory) returns the block and fills own.saved; `memory` is the
  // thread's own, of `bytes` bytes.
  template <class Prepare> void run_blocks(int threads, size_t bytes, const Prepare& prepare) const {
    Carver shared_size, own_size;
    carve_shared(shared_size);
    carve_own(own_size);
    GradientSums<S> sums(pass, layers, chunks);
    threads = int(std::min<int64_t>(useful_threads(2 * multiply_adds(network, layers, rows), threads), chunks));
    const size_t own_bytes = own_size.used() + bytes;
    const Workspace workspace(shared_size.used() + sums.bytes() + size_t(threads) * own_bytes);
    Carver carver(workspace.data());
    const Shared shared = carve_shared(carver);
    sums.place(workspace.data() + shared_size.used());
    char* const owns = workspace.data() + shared_size.used() + sums.bytes();
    pack_weights(shared);
    run_tasks(chunks, threads, [&](int64_t chunk, int slot) {
      Carver own_carver(owns + size_t(slot) * own_bytes);
      const Own own = carve_own(own_carver);
      char* const memory = owns + size_t(slot) * own_bytes + own_size.used();
      table.mark();
      const Range range = part_of(rows, 1, chunk, chunks);
      const int64_t blocks = std::max<int64_t>(1, ceil_divide(range.size(), block));
      for (int64_t b = 0; b < blocks; b++) {
        const Range part = part_of(range.size(), 1, b, blocks);
        const Range here{range.begin + part.begin, range.begin + part.end};
        run_rows(here, prepare(here, chunk, own, memory), b > 0, shared, own, sums.of_chunk(chunk));
      }
    });
    sums.add_up();
  }

  int64_t chunk_count() const { return chunks; }

 private:
  Shared carve_shared(Carver& carver) const {
    Shared shared;
    shared.reserve(layers.end - layers.first);
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const bool packed = needs_dgrad(l) && !in_place(l);
      const int64_t size = panels_size(kernels, layer.in_features, layer.out_features);
      shared.push_back(packed ? carver.take<S>(size) : nullptr);
    }
    return shared;
  }
  Own carve_own(Carver& carver) const {
    Own own;
    own.tile = carver.take<S>(kernels.mr * kernels.nr);
    own.input = copies_input ? carver.take<S>(block * network.layers[0].in_features) : nullptr;
    own.layer_input = carver.take<S>(block * width);
    for (S*& grad : own.grad) grad = carver.take<S>(block * width);
    own.saved = carver.take<const S*>(int64_t(layers.end));
    return own;
  }

  void pack_weights(const Shared& shared) const {
    for (size_t l = layers.first; l < layers.end; l++) {
      S* const panels = shared[l - layers.first];
      const Layer& layer = network.layers[l];
      if (panels) pack_panels(kernels, layer.weight, layer.in_features, layer.out_features, false, panels);
    }
  }

  // Whether dgrad reads the weights as they lie.
  bool in_place(size_t l) const { return network.layers[l].weight.column_stride == 1; }
  bool needs_dgrad(size_t l) const { return l > layers.first || grad_input; }

  // The block at some rows of what the pass was given.
  Block block_of(Range range, const Own& own) const {
    const size_t last = layers.end - 1;
    const int64_t outputs = network.layers[last].out_features;
    Block found{network.input, static_cast<const S*>(grad_output.data) + range.begin * outputs};
    if (copies_grad) found.grad = static_cast<const S*>(copied(grad_output, range, outputs, own.grad[last % 2]).data);
    for (size_t l = layers.first == 0 ? 0 : layers.first - 1; l < layers.end; l++) {
      const S* const saved = static_cast<const S*>(pass.saved[l].data);
      own.saved[l] = saved ? saved + range.begin * network.layers[l].out_features : nullptr;
    }
    if (copies_input) {
      found.input = copied(network.input, range, network.layers[0].in_features, own.input);
    } else {
      found.input.data = static_cast<S*>(network.input.data) + range.begin * network.input.row_stride;
    }
    return found;
  }

  // Takes the block's gradients through all layers, and adds its share to the sums, or begins them with it.
  void run_rows(Range range, const Block& rows, bool add, const Shared& shared, const Own& own,
                const std::vector<LayerSums<S>>& sums) const {
    const int64_t m = range.size();
    const S* grad = rows.grad;
    for (size_t l = layers.end; l-- > layers.first;) {
      const Layer& layer = network.layers[l];
      S* const own_grad = own.grad[l % 2];
      if (layer.drops()) {
        drop(kernels, layer, range, grad, own_grad);
        grad = own_grad;
      }
      if (layer.activation.kind != identity_kind) {
        kernels.activations[layer.activation.kind].gradient(m * layer.out_features, grad, own.saved[l], own_grad,
                                                            layer.activation.scalars);
        grad = own_grad;
      }
      const LayerSums<S>& sum = sums[l - layers.first];
      if (sum.bias) kernels.column_sums(m, layer.out_features, grad, sum.bias, add);
      if (sum.weight) multiply_rows(kernels, wgrad(l, rows.input, range, grad, own, sum.weight, add), own.tile);
      if (!needs_dgrad(l)) break;
      S* const output = l == layers.first ? grad_input + range.begin * layer.in_features : own.grad[(l + 1) % 2];
      multiply_rows(kernels, dgrad(l, m, grad, shared[l - layers.first], output), own.tile);
      grad = output;
    }
  }

  // grad_weight (+)= grad^T input, where `input` is that of the whole network.
  RowProduct<S> wgrad(size_t l, const Matrix& input, Range range, const S* grad, const Own& own, S* sum,
                      bool add) const {
    const Layer& layer = network.layers[l];
    RowProduct<S> p;
    p.m = layer.out_features;
    p.n = layer.in_features;
    p.k = range.size();
    p.a = grad;
    p.a_step = 1;
    p.a_k_step = layer.out_features;
    p.b_step = layer.in_features;
    if (l == 0) {
      p.b = static_cast<const S*>(input.data);
      p.b_step = input.row_stride;
    } else {
      const Layer& below = network.layers[l - 1];
      p.b = own.saved[l - 1];
      if (const ActivationSpec& act = below.activation; !keeps_output(act)) {
        kernels.activations[act.kind].value(p.k * p.n, p.b, own.layer_input, act.scalars);
        p.b = own.layer_input;
      }
      if (below.drops()) {
        drop(kernels, below, range, p.b, own.layer_input);
        p.b = own.layer_input;
      }
    }
    p.b_panel = kernels.nr;
    p.b_padded = false;
    p.output = sum;
    p.output_step = layer.in_features;
    p.sums = true;
    p.add = add;
    return p;
  }

  // grad_input = grad weight.
  RowProduct<S> dgrad(size_t l, int64_t m, const S* grad, const S* panels, S* output) const {
    const Layer& layer = network.layers[l];
    RowProduct<S> p;
    p.m = m;
    p.n = layer.in_features;
    p.k = layer.out_features;
    p.a = grad;
    p.a_step = layer.out_features;
    p.a_k_step = 1;
    p.b = panels ? panels : static_cast<const S*>(layer.weight.data);
    p.b_panel = panels ? layer.out_features * kernels.nr : kernels.nr;
    p.b_step = panels ? kernels.nr : layer.weight.row_stride;
    p.b_padded = panels != nullptr;
    p.output = output;
    p.output_step = layer.in_features;
    return p;
  }

  const KernelTable& table;
  const Kernels<S>& kernels;
  const BackwardPass& pass;
  const Network& network;
  const Layers layers;
  const Matrix grad_output;
  S* const grad_input;
  const int64_t rows, width, block, chunks;
  const bool copies_input, copies_grad;
};

}  // namespace fastmlp::cpu
