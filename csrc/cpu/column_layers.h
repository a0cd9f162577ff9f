// Layers that are no product, such as batch normalisation, and dropout behind wide products: passes over the elements
// or the columns of all rows, one layer after another. Used by network.cpp. Leaves arithmetic to the kernels of the
// table and to rows.h; S is float or double.
#pragma once

#include "../contract/activation_info.h"
#include "network.h"
#include "parallel.h"
#include "row_shape.h"
#include "rows.h"

namespace fastmlp::cpu {

template <class S> class ColumnLayers {
 public:
  ColumnLayers(const KernelTable& table, const Network& network, int threads)
      : table(table), kernels(kernels_of<S>(table)), network(network), threads(threads) {}

  // A layer that is no product, from its input to its output before dropout. `pre_activation` may be null, or `output`.
  void forward(size_t l, const S* input, S* output, S* pre_activation) const {
    const Layer& layer = network.layers[l];
    const ActivationSpec& act = layer.activation;
    const S* values = input;
    if (layer.map == Map::batch_norm) {
      S* const normalised = pre_activation ? pre_activation : output;
      batch_norm(norm_pass(layer, input, normalised), threads);
      values = normalised;
    }
    each(layer, [&](Range rows, int64_t at, int64_t n) {
      if (pre_activation && values != pre_activation) std::copy_n(values + at, n, pre_activation + at);
      if (act.kind != identity_kind) {
        kernels.activations[act.kind].value(n, values + at, output + at, act.scalars);
      } else if (values != output) {
        std::copy_n(values + at, n, output + at);
      }
    });
  }

  // out = what dropout makes of x; out may be x.
  void drop_rows(size_t l, const S* x, S* out) const {
    const Layer& layer = network.layers[l];
    each(layer, [&](Range rows, int64_t at, int64_t) { drop(kernels, layer, rows, x + at, out + at); });
  }

  // Writes the output of a layer, computed once more from what it kept, to `out`.
  void output_again(size_t l, const S* kept, S* out) const {
    const Layer& layer = network.layers[l];
    const ActivationSpec& act = layer.activation;
    each(layer, [&](Range rows, int64_t at, int64_t n) {
      const S* values = kept + at;
      if (!keeps_output(act)) {
        kernels.activations[act.kind].value(n, values, out + at, act.scalars);
        values = out + at;
      }
      if (layer.drops()) drop(kernels, layer, rows, values, out + at);
    });
  }

  // The gradients that are asked for of a layer that is no product, from that of its output before dropout. `spare`
  // holds as much as the gradient, which may lie there.
  void backward(size_t l, const S* grad, const S* input, const S* saved, const BackwardPass& pass, S* grad_input,
                S* spare) const {
    const Layer& layer = network.layers[l];
    const ActivationSpec& act = layer.activation;
    const bool is_norm = layer.map == Map::batch_norm;
    S* const out = is_norm ? spare : grad_input;
    if (act.kind != identity_kind) {
      each(layer, [&](Range, int64_t at, int64_t n) {
        kernels.activations[act.kind].gradient(n, grad + at, saved + at, out + at, act.scalars);
      });
      grad = out;
    } else if (!is_norm) {
      each(layer, [&](Range, int64_t at, int64_t n) { std::copy_n(grad + at, n, out + at); });
    }
    if (is_norm) batch_norm_backward(norm_backward_pass(l, grad, input, pass, grad_input), threads);
  }

 private:
  RowsShape shape_of(const Layer& layer) const { return {network.dtype, network.rows, layer.out_features}; }

  BatchNormPass norm_pass(const Layer& layer, const S* input, S* output) const {
    const Normalisation& norm = layer.norm;
    BatchNormPass pass;
    pass.shape = shape_of(layer);
    pass.training = norm.of_batch;
    pass.input = input;
    pass.weight = norm.weight;
    pass.bias = norm.bias;
    pass.running_mean = norm.running_mean;
    pass.running_variance = norm.running_variance;
    pass.momentum = norm.momentum;
    pass.eps = norm.eps;
    pass.output = output;
    pass.mean = norm.mean;
    pass.rstd = norm.rstd;
    return pass;
  }

  BatchNormBackwardPass norm_backward_pass(size_t l, const S* grad, const S* input, const BackwardPass& all,
                                           S* grad_input) const {
    const Layer& layer = network.layers[l];
    const Normalisation& norm = layer.norm;
    BatchNormBackwardPass pass;
    pass.shape = shape_of(layer);
    pass.grad = grad;
    pass.input = input;
    pass.mean = norm.of_batch ? norm.mean : norm.running_mean;
    pass.rstd = norm.of_batch ? norm.rstd : nullptr;
    pass.running_variance = norm.of_batch ? nullptr : norm.running_variance;
    pass.eps = norm.eps;
    pass.weight = norm.weight;
    pass.grad_input = grad_input;
    pass.grad_weight = all.grad_weights[l];
    pass.grad_bias = all.grad_biases[l];
    return pass;
  }

  // Calls f(rows, first element, elements) for ranges of rows.
  template <class F> void each(const Layer& layer, const F& f) const {
    const int64_t columns = layer.out_features;
    share_rows(network.rows, network.rows * columns, threads, [&](int64_t begin, int64_t end) {
      table.mark();
      f(Range{begin, end}, begin * columns, (end - begin) * columns);
    });
  }

  const KernelTable& table;
  const Kernels<S>& kernels;
  const Network& network;
  const int threads;
};

// Whether a pass over the network needs them.
inline bool has_column_layers(const Network& network) {
  return std::any_of(network.layers.begin(), network.layers.end(),
                     [](const Layer& layer) { return layer.drops() || layer.map != Map::product; });
}

}  // namespace fastmlp::cpu
