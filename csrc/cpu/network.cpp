// Strategy of the CPU device: layer by layer through the packed product. Forward that keeps nothing
// goes through the network in blocks of rows, so that hidden outputs need little scratch. Baseline
// code; all arithmetic is in gemm.cpp and behind it.
#include "network.h"

#include <algorithm>

#include "../activation_info.h"
#include "dispatch.h"
#include "gemm.h"
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

// The same matrix from a later row on.
template <class S> Matrix from_row(Matrix x, int64_t row) {
  x.data = static_cast<S*>(x.data) + row * x.row_stride;
  return x;
}

Matrix gapless(void* data, int64_t columns) { return {data, columns, 1}; }

int64_t widest_hidden(const Network& network) {
  int64_t width = 0;
  for (size_t l = 0; l + 1 < network.layers.size(); l++) width = std::max(width, network.layers[l].out_features);
  return width;
}

// output = act(input weight^T + bias) for `rows` rows.
template <class S>
void layer_forward(const KernelTable& table, const Layer& layer, int64_t rows, const Matrix& input, S* output,
                   S* pre_activation, int threads) {
  Product<S> p;
  p.m = rows;
  p.n = layer.out_features;
  p.k = layer.in_features;
  p.a = rows_of<S>(input);
  p.b = rows_of<S>(layer.weight);
  p.output = output;
  p.pre_activation = pre_activation;
  p.leading_dimension = layer.out_features;
  p.bias = layer.bias;
  p.activation = layer.activation;
  multiply(table, p, threads);
}

template <class S> void forward_keeping(const ForwardPass& pass, int threads) {
  const KernelTable& table = active();
  const Network& network = pass.network;
  const size_t last = network.layers.size() - 1;
  // A hidden layer that keeps its pre-activation needs its output for the next layer only.
  Carver measure;
  measure.take<S>(network.rows * widest_hidden(network));
  bool spare = false;
  for (size_t l = 0; l < last; l++) spare |= !keeps_output(network.layers[l].activation);
  const Workspace workspace(spare ? 2 * measure.used() : 0);
  Matrix input = network.input;
  for (size_t l = 0; l <= last; l++) {
    const Layer& layer = network.layers[l];
    const bool keeps = keeps_output(layer.activation);
    S* const kept = static_cast<S*>(pass.kept[l]);
    S* output = static_cast<S*>(pass.output);
    if (l < last) output = keeps ? kept : reinterpret_cast<S*>(workspace.data() + l % 2 * measure.used());
    layer_forward(table, layer, network.rows, input, output, keeps ? nullptr : kept, threads);
    input = gapless(output, layer.out_features);
  }
}

template <class S> void forward_only(const ForwardPass& pass, int threads) {
  const KernelTable& table = active();
  const Network& network = pass.network;
  const size_t last = network.layers.size() - 1;
  const int64_t width = widest_hidden(network);
  int64_t block = network.rows;
  if (width > 0 && block > 0) {
    // Equal blocks, by the shape alone: a short last one could take the path of a small batch, and
    // the number of threads must not change a bit.
    const int64_t most = std::max(hidden_bytes / (2 * width * int64_t(sizeof(S))), fewest_rows);
    const int64_t blocks = (block + most - 1) / most;
    block = (block + blocks - 1) / blocks;
  }
  Carver measure;
  measure.take<S>(block * width);
  const Workspace workspace(last > 0 ? 2 * measure.used() : 0);
  for (int64_t row = 0; row < network.rows; row += block) {
    const int64_t rows = std::min(block, network.rows - row);
    Matrix input = from_row<S>(network.input, row);
    for (size_t l = 0; l <= last; l++) {
      const Layer& layer = network.layers[l];
      S* const output = l == last ? static_cast<S*>(pass.output) + row * layer.out_features
                                  : reinterpret_cast<S*>(workspace.data() + l % 2 * measure.used());
      layer_forward<S>(table, layer, rows, input, output, nullptr, threads);
      input = gapless(output, layer.out_features);
    }
  }
}

// A gradient with respect to a layer's output as the gradient with respect to its pre-activation,
// formed while it is packed and never stored.
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
void layer_wgrad(const KernelTable& table, const BackwardPass& pass, size_t l, const Matrix& grad, int threads) {
  const Network& network = pass.network;
  const Layer& layer = network.layers[l];
  Product<S> p;
  p.m = layer.out_features;
  p.n = pass.grad_weights[l] ? layer.in_features : 0;
  p.k = network.rows;
  p.a = formed_gradient(columns_of<S>(grad), columns_of<S>(pass.saved[l]), layer.activation);
  p.b = columns_of<S>(l == 0 ? network.input : pass.saved[l - 1]);
  if (l > 0 && !keeps_output(network.layers[l - 1].activation)) {
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

template <class S> void backward_of(const BackwardPass& pass, int threads) {
  const KernelTable& table = active();
  const Network& network = pass.network;
  const size_t count = network.layers.size();
  size_t first = 0;  // the lowest layer that a gradient is asked of
  if (!pass.grad_input) {
    while (first < count && !pass.grad_weights[first] && !pass.grad_biases[first]) first++;
  }
  Carver measure;
  measure.take<S>(network.rows * widest_hidden(network));
  const Workspace workspace(first + 1 < count ? 2 * measure.used() : 0);
  Matrix grad = pass.grad_output;
  for (size_t l = count; l-- > first;) {
    if (pass.grad_weights[l] || pass.grad_biases[l]) layer_wgrad<S>(table, pass, l, grad, threads);
    if (l == first && !pass.grad_input) break;
    S* const output =
        l == 0 ? static_cast<S*>(pass.grad_input) : reinterpret_cast<S*>(workspace.data() + l % 2 * measure.used());
    layer_dgrad(table, pass, l, grad, output, threads);
    grad = gapless(output, network.layers[l].in_features);
  }
}

}  // namespace

void forward(const ForwardPass& pass, int threads) {
  with_storage(pass.network.dtype, [&](auto storage) {
    using S = decltype(storage);
    pass.kept.empty() ? forward_only<S>(pass, threads) : forward_keeping<S>(pass, threads);
  });
}

void backward(const BackwardPass& pass, int threads) {
  with_storage(pass.network.dtype, [&](auto storage) { backward_of<decltype(storage)>(pass, threads); });
}

}  // namespace fastmlp::cpu
