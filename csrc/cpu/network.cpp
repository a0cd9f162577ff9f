// The strategy of the CPU device: narrow layers go together (row_blocks.h), wide ones one by one (gemm.h). Forward that
// keeps nothing goes through the network in blocks of rows, so that hidden outputs need little scratch. Called by
// register.cpp and step.cpp. Baseline code, without arithmetic of its own.
#include "network.h"

#include <algorithm>

#include "../contract/activation_info.h"
#include "../contract/shape.h"
#include "column_layers.h"
#include "dispatch.h"
#include "gemm.h"
#include "parallel.h"
#include "row_blocks.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// Hidden outputs of a forward that keeps nothing, both of its two buffers together.
constexpr int64_t hidden_bytes = int64_t(4) << 20;
constexpr int64_t fewest_rows = 2048;

template <class S> Operand<S> operand(const Matrix& x, int64_t stride, int64_t k_stride) {
  Operand<S> operand;
  operand.data = static_cast<const S*>(x.data);
  operand.stride = stride;
  operand.k_stride = k_stride;
  return operand;
}
template <class S> Operand<S> rows_of(const Matrix& x) { return operand<S>(x, x.row_stride, x.column_stride); }
template <class S> Operand<S> columns_of(const Matrix& x) { return operand<S>(x, x.column_stride, x.row_stride); }

// The same matrix, from a later row on.
template <class S> Matrix from_row(Matrix x, int64_t row) {
  x.data = static_cast<S*>(x.data) + row * x.row_stride;
  return x;
}

template <class S>
void layers_forward(const KernelTable& table, const Network& network, const Layers& layers, const Matrix& input,
                    int64_t rows, const Place<S>* places, int threads) {
  const bool alone = layers.end - layers.first == 1;
  if constexpr (in_itself<S>) {
    if (layers.narrow && !(alone && network.layers[layers.first].in_features <= streamed_depth))
      return forward_blocks(table, network, layers, input, rows, places, threads);
  }
  const Layer& layer = network.layers[layers.first];
  const Place<S>& place = places[layers.first];
  S* const output = place.output ? place.output : place.dropped;
  if (layer.map == Map::product) {
    Product<S> p;
    set_forward(p, layer, rows, input, output, place.pre_activation);
    multiply(table, p, threads);
  }
  if constexpr (in_itself<S>) {
    const ColumnLayers<S> columns(table, network, threads);
    if (layer.map != Map::product)
      columns.forward(layers.first, static_cast<const S*>(input.data), output, place.pre_activation);
    if (layer.drops()) columns.drop_rows(layers.first, output, place.dropped);
  }
}

template <class S> void forward_keeping(const ForwardPass& pass, int threads) {
  const KernelTable& table = active();
  const Network& network = pass.network;
  const size_t last = network.layers.size() - 1;
  const std::vector<Layers> parts = divide<S>(network);
  // A hidden layer that keeps its pre-activation needs its output only for the next layer; and if that belongs to the
  // same part, row_blocks.h keeps the output to itself.
  std::vector<Place<S>> places(network.layers.size());
  for (size_t l = 0; l <= last; l++) {
    const LayerOutputs outputs = outputs_of(pass, l);
    places[l] = {static_cast<S*>(outputs.output), static_cast<S*>(outputs.pre_activation),
                 static_cast<S*>(outputs.dropped)};
  }
  // Where the next part finds what this one makes.
  const auto end_of = [&](const Layers& part) -> S*& {
    Place<S>& place = places[part.end - 1];
    return network.layers[part.end - 1].drops() ? place.dropped : place.output;
  };
  Carver measure;
  measure.take<S>(network.rows * widest_hidden(network));
  bool spare = false;
  for (const Layers& part : parts) spare |= !end_of(part);
  const Workspace workspace(spare ? 2 * measure.used() : 0);
  Matrix input = network.input;
  for (size_t i = 0; i < parts.size(); i++) {
    S*& output = end_of(parts[i]);
    if (!output) output = reinterpret_cast<S*>(workspace.data() + i % 2 * measure.used());
    layers_forward(table, network, parts[i], input, network.rows, places.data(), threads);
    input = gapless(output, network.layers[parts[i].end - 1].out_features);
  }
}

template <class S> void forward_only(const ForwardPass& pass, int threads) {
  const KernelTable& table = active();
  const Network& network = pass.network;
  const std::vector<Layers> parts = divide<S>(network);
  const int64_t width = parts.size() > 1 ? widest_hidden(network) : 0;
  int64_t block = network.rows;
  // Blocks are equal and follow from the shape alone, because a short last one could take the path of a small batch,
  // and because the number of threads must not change a bit.
  if (width > 0) block = even_block(block, std::max(hidden_bytes / (2 * width * int64_t(sizeof(S))), fewest_rows));
  Carver measure;
  measure.take<S>(block * width);
  const Workspace workspace(width > 0 ? 2 * measure.used() : 0);
  std::vector<Place<S>> places(network.layers.size());
  for (int64_t row = 0; row < network.rows; row += block) {
    const int64_t rows = std::min(block, network.rows - row);
    Matrix input = from_row<S>(network.input, row);
    for (size_t i = 0; i < parts.size(); i++) {
      const int64_t features = network.layers[parts[i].end - 1].out_features;
      S* const output = i + 1 == parts.size() ? static_cast<S*>(pass.output) + row * features
                                              : reinterpret_cast<S*>(workspace.data() + i % 2 * measure.used());
      places[parts[i].end - 1].output = output;
      layers_forward(table, network, parts[i], input, rows, places.data(), threads);
      input = gapless(output, features);
    }
  }
}

// Turns the gradient with respect to a layer's output into that with respect to its pre-activation, which is computed
// while it is packed, and never stored.
template <class S> Operand<S> formed_gradient(Operand<S> grad, const Operand<S>& saved, const ActivationSpec& act) {
  if (act.kind == identity_kind) return grad;
  grad.form = Form::gradient;
  grad.activation = act;
  grad.saved = saved.data;
  grad.saved_stride = saved.stride;
  grad.saved_k_stride = saved.k_stride;
  return grad;
}

// grad_weight = dz^T input; grad_bias = the column sums of dz.
template <class S>
void layer_wgrad(const KernelTable& table, const BackwardPass& pass, size_t l, const Matrix& grad, const Matrix& input,
                 int threads) {
  const Network& network = pass.network;
  const Layer& layer = network.layers[l];
  Product<S> p;
  p.m = layer.out_features;
  p.n = pass.grad_weights[l] ? layer.in_features : 0;
  p.k = network.rows;
  p.a = formed_gradient(columns_of<S>(grad), columns_of<S>(pass.saved[l]), layer.activation);
  p.b = columns_of<S>(input);
  if (l > 0 && input.data == pass.saved[l - 1].data && !keeps_output(network.layers[l - 1].activation)) {
    p.b.form = Form::value;
    p.b.activation = network.layers[l - 1].activation;
  }
  p.output = static_cast<S*>(pass.grad_weights[l]);
  p.leading_dimension = layer.in_features;
  p.row_sums = static_cast<S*>(pass.grad_biases[l]);
  p.split_k = true;
  multiply(table, p, threads);
}

// grad_input = dz weight.
template <class S>
void layer_dgrad(const KernelTable& table, const BackwardPass& pass, size_t l, const Matrix& grad, S* output,
                 int threads) {
  const Layer& layer = pass.network.layers[l];
  Product<S> p;
  p.m = pass.network.rows;
  p.n = layer.in_features;
  p.k = layer.out_features;
  p.a = formed_gradient(rows_of<S>(grad), rows_of<S>(pass.saved[l]), layer.activation);
  p.b = columns_of<S>(layer.weight);
  p.output = output;
  p.leading_dimension = layer.in_features;
  multiply(table, p, threads);
}

// Memory beside the gradients that go from layer to layer, where has_column_layers(): for a layer's gradient before
// dropout, and for its input where that is not what the layer below has saved.
template <class S> struct Spare {
  bool needed = false;
  S *grad = nullptr, *input = nullptr;
};

// The input of layer l as its own backward reads it. A product may read the layer's pre-activation instead, of which it
// computes the output itself while it packs it.
template <class S>
Matrix input_of(const BackwardPass& pass, size_t l, const ColumnLayers<S>& columns, const Spare<S>& spare) {
  const Network& network = pass.network;
  if (l == 0) return network.input;
  const Layer& below = network.layers[l - 1];
  const bool is_product = network.layers[l].map == Map::product;
  if (!below.drops() && (is_product || keeps_output(below.activation))) return pass.saved[l - 1];
  columns.output_again(l - 1, static_cast<const S*>(pass.saved[l - 1].data), spare.input);
  return gapless(spare.input, below.out_features);
}

// Computes the gradients asked for, and that with respect to the layers' input unless `output` is null.
template <class S>
void layers_backward(const KernelTable& table, const BackwardPass& pass, const Layers& layers, Matrix grad, S* output,
                     const Spare<S>& spare, int threads) {
  const size_t l = layers.first;
  const Network& network = pass.network;
  const bool asked = pass.grad_weights[l] || pass.grad_biases[l];
  Matrix input = l == 0 ? network.input : pass.saved[l - 1];
  if constexpr (in_itself<S>) {
    if (layers.narrow) return backward_blocks(table, pass, layers, grad, output, threads);
    if (spare.needed) {
      const Layer& layer = network.layers[l];
      const ColumnLayers<S> columns(table, network, threads);
      if (layer.drops()) {
        columns.drop_rows(l, static_cast<const S*>(grad.data), spare.grad);
        grad = gapless(spare.grad, layer.out_features);
      }
      const bool is_product = layer.map == Map::product;
      if (asked || layer.map == Map::batch_norm) input = input_of(pass, l, columns, spare);
      if (!is_product) {
        return columns.backward(l, static_cast<const S*>(grad.data), static_cast<const S*>(input.data),
                                static_cast<const S*>(pass.saved[l].data), pass, output, spare.grad);
      }
    }
  }
  if (asked) layer_wgrad<S>(table, pass, l, grad, input, threads);
  if (output) layer_dgrad(table, pass, l, grad, output, threads);
}

template <class S> void backward_of(const BackwardPass& pass, int threads) {
  const KernelTable& table = active();
  const Network& network = pass.network;
  const size_t lowest = lowest_layer(pass);
  std::vector<Layers> parts;
  for (Layers part : divide<S>(network)) {
    part.first = std::max(part.first, lowest);
    if (part.first >= part.end) continue;
    if (part.narrow && gapless_for_blocks(pass, part)) {
      parts.push_back(part);
    } else {
      for (size_t l = part.first; l < part.end; l++) parts.push_back({l, l + 1, false});
    }
  }
  Carver measure;
  measure.take<S>(network.rows * widest_hidden(network));
  const size_t between = parts.size() > 1 ? 2 * measure.used() : 0;
  Spare<S> spare;
  spare.needed = has_column_layers(network);
  const int64_t most = std::max(widest_hidden(network), network.layers.back().out_features);
  Carver size;
  if (spare.needed) size.take<S>(network.rows * most);
  const Workspace workspace(between + 2 * size.used());
  if (spare.needed) {
    Carver carver(workspace.data() + between);
    spare.grad = carver.take<S>(network.rows * most);
    spare.input = carver.take<S>(network.rows * most);
  }
  Matrix grad = pass.grad_output;
  for (size_t i = parts.size(); i-- > 0;) {
    const size_t l = parts[i].first;
    S* output = static_cast<S*>(pass.grad_input);
    if (l > 0) output = i == 0 ? nullptr : reinterpret_cast<S*>(workspace.data() + i % 2 * measure.used());
    layers_backward(table, pass, parts[i], grad, output, spare, threads);
    grad = gapless(output, network.layers[l].in_features);
  }
}

// Whether a pass has any element to write. Rows without elements take no memory, so that there may be any number of
// them, over which nothing may loop.
bool writes(const ForwardPass& pass) {
  const std::vector<Layer>& layers = pass.network.layers;
  if (pass.network.rows == 0) return false;
  bool any = layers.back().out_features > 0;
  for (size_t l = 0; l < pass.kept.size(); l++) any |= pass.kept[l] && layers[l].out_features > 0;
  return any;
}
bool writes(const BackwardPass& pass) {
  const std::vector<Layer>& layers = pass.network.layers;
  bool any = pass.grad_input && pass.network.rows > 0 && layers.front().in_features > 0;
  for (size_t l = 0; l < layers.size(); l++) {
    any |= pass.grad_weights[l] && layers[l].in_features > 0 && layers[l].out_features > 0;
    any |= pass.grad_biases[l] && layers[l].out_features > 0;
  }
  return any;
}

}  // namespace

void forward(const ForwardPass& pass, int threads) {
  if (!writes(pass)) return;
  with_storage(pass.network.dtype, [&](auto storage) {
    using S = decltype(storage);
    pass.kept.empty() ? forward_only<S>(pass, threads) : forward_keeping<S>(pass, threads);
  });
}

void backward(const BackwardPass& pass, int threads) {
  if (!writes(pass)) return;
  with_storage(pass.network.dtype, [&](auto storage) { backward_of<decltype(storage)>(pass, threads); });
}

}  // namespace fastmlp::cpu
