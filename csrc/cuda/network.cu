// Strategy of the GPU: narrow networks go through one kernel (narrow.h), others layer by layer. Backward carries the
// gradient of pre-activations down: a layer's dgrad applies the derivative of the layer below and sums its bias
// gradient, so that only the last layer may need a pass of its own. A last layer without an activation needs none,
// because its wgrad sums the bias gradient. Knows no tensors; chooses no tiles, which products.h does.
#include "network.h"

#include <algorithm>
#include <vector>

#include "../contract/activation_info.h"
#include "../contract/storage.h"
#include "narrow.h"
#include "workspace.h"

namespace fastmlp::cuda {
namespace {

template <class S> Operand<S> rows_of(const Matrix& x) {
  return {static_cast<const S*>(x.data), x.row_stride, x.column_stride};
}
template <class S> Operand<S> columns_of(const Matrix& x) {
  return {static_cast<const S*>(x.data), x.column_stride, x.row_stride};
}

template <class S>
void layer_forward(const Context& context, const Layer& layer, int64_t rows, const Matrix& input, S* output,
                   S* pre_activation) {
  Product<S> p;
  p.m = rows;
  p.n = layer.out_features;
  p.k = layer.in_features;
  p.a = rows_of<S>(input);
  p.b = rows_of<S>(layer.weight);
  p.output = output;
  p.pre_activation = pre_activation;
  p.bias = static_cast<const S*>(layer.bias.data);
  p.bias_stride = layer.bias.stride;
  p.activation = layer.activation;
  Kernels<S>::multiply(context, Kernels<S>::plan(context, Epilogue::forward, p), Epilogue::forward, p);
}

template <class S> void forward_of(const Context& context, const ForwardPass& pass) {
  const Network& network = pass.network;
  const size_t last = network.layers.size() - 1;
  with_memory(context, [&](Carver& carver, bool run) {
    // Outputs that nobody keeps take turns in two buffers, where each stays until the next layer has read it.
    S* spare[2] = {};
    for (size_t i = 0; i < std::min<size_t>(last, 2); i++)
      spare[i] = carver.take<S>(network.rows * widest_hidden(network));
    if (!run) return;
    Matrix input = network.input;
    for (size_t l = 0; l <= last; l++) {
      const Layer& layer = network.layers[l];
      const LayerOutputs kept = outputs_of(pass, l);
      S* const output = kept.output ? static_cast<S*>(kept.output) : spare[l % 2];
      layer_forward(context, layer, network.rows, input, output, static_cast<S*>(kept.pre_activation));
      input = gapless(output, layer.out_features);
    }
  });
}

template <class S> class Backward {
 public:
  using C = Compute<S>;

  Backward(const Context& context, const BackwardPass& pass)
      : context_(context),
        pass_(pass),
        network_(pass.network),
        last_(pass.network.layers.size() - 1),
        lowest_(lowest_layer(pass)) {}

  // Runs the pass; or, unless it launches, only adds up the memory that it takes.
  void run(Carver& carver, bool launches) {
    launches_ = launches;
    if (lowest_ > last_) return;
    for (size_t i = 0; i < 2; i++) gradients_[i] = carver.take<S>(needs_gradient(i) ? network_.rows * widest() : 0);
    input_ = carver.take<S>(needs_inputs() ? network_.rows * widest_hidden(network_) : 0);
    Matrix grad = last_gradient(carver);
    for (size_t l = last_ + 1; l-- > lowest_;) {
      if (pass_.grad_weights[l]) wgrad(carver, l, grad);
      if (l > lowest_ || pass_.grad_input) grad = dgrad(carver, l, grad);
    }
  }

 private:
  int64_t widest() const { return std::max(widest_hidden(network_), network_.layers[last_].out_features); }

  bool kept_output(size_t l) const { return keeps_output(network_.layers[l].activation); }

  // Gradients of pre-activations take turns in two buffers. That of a last layer without activation is the caller's.
  bool needs_gradient(size_t turn) const {
    for (size_t l = lowest_; l <= last_; l++) {
      if (l % 2 == turn && (l < last_ || network_.layers[l].activation.kind != identity_kind)) return true;
    }
    return false;
  }

  bool needs_inputs() const {
    for (size_t l = std::max<size_t>(lowest_, 1); l <= last_; l++) {
      if (pass_.grad_weights[l] && !kept_output(l - 1)) return true;
    }
    return false;
  }

  // Whether the last layer's bias gradient comes from its wgrad, which reads the caller's gradient anyway.
  bool wgrad_sums_bias() const {
    const Layer& layer = network_.layers[last_];
    return layer.activation.kind == identity_kind && pass_.grad_weights[last_] && layer.in_features > 0;
  }

  // Returns the gradient of the last layer's pre-activation, and writes its bias gradient if no wgrad sums that.
  Matrix last_gradient(Carver& carver) {
    const Layer& layer = network_.layers[last_];
    const int64_t features = layer.out_features, runs = runs_of(network_.rows);
    const bool identity = layer.activation.kind == identity_kind;
    S* const bias = wgrad_sums_bias() ? nullptr : static_cast<S*>(pass_.grad_biases[last_]);
    S* const output = identity ? nullptr : gradients_[last_ % 2];
    C* const sums = bias ? carver.take<C>(runs * features) : nullptr;
    if (launches_ && (output || bias)) {
      Kernels<S>::apply_gradient(context_, network_.rows, features, pass_.grad_output,
                                 identity ? Matrix() : pass_.saved[last_], layer.activation, output, sums);
      if (bias) Kernels<S>::sum_partials(context_, sums, runs, features, bias);
    }
    return identity ? pass_.grad_output : gapless(output, features);
  }

  // grad_weight = grad^T input. Also the sums of grad's columns, if wgrad_sums_bias() for this layer.
  void wgrad(Carver& carver, size_t l, const Matrix& grad) {
    const Layer& layer = network_.layers[l];
    Matrix input = l == 0 ? network_.input : pass_.saved[l - 1];
    if (l > 0 && !kept_output(l - 1)) {
      if (launches_)
        Kernels<S>::apply_activation(context_, network_.rows, layer.in_features, input,
                                     network_.layers[l - 1].activation, input_);
      input = gapless(input_, layer.in_features);
    }
    Product<S> p;
    p.m = layer.out_features;
    p.n = layer.in_features;
    p.k = network_.rows;
    p.a = columns_of<S>(grad);
    p.b = columns_of<S>(input);
    p.output = static_cast<S*>(pass_.grad_weights[l]);
    const Plan found = Kernels<S>::plan(context_, Epilogue::wgrad, p);
    if (l == last_ && wgrad_sums_bias()) p.row_sums = static_cast<S*>(pass_.grad_biases[l]);
    if (found.tile == library_call) {
      if (p.row_sums) p.row_partials = carver.take<C>(runs_of(p.k) * p.m);
    } else if (found.parts > 1) {
      p.partials = carver.take<C>(found.parts * p.m * p.n);
      if (p.row_sums) p.row_partials = carver.take<C>(found.parts * p.m);
    }
    if (launches_) Kernels<S>::multiply(context_, found, Epilogue::wgrad, p);
  }

  // Returns the gradient of the pre-activation of the layer below and writes that layer's bias gradient; for the first
  // layer, returns the gradient of the input.
  Matrix dgrad(Carver& carver, size_t l, const Matrix& grad) {
    const Layer& layer = network_.layers[l];
    Product<S> p;
    p.m = network_.rows;
    p.n = layer.in_features;
    p.k = layer.out_features;
    p.a = rows_of<S>(grad);
    p.b = columns_of<S>(layer.weight);
    p.output = l == 0 ? static_cast<S*>(pass_.grad_input) : gradients_[(l - 1) % 2];
    const Plan found = Kernels<S>::plan(context_, Epilogue::dgrad, p);
    S* bias = nullptr;
    if (l > 0) {
      bias = static_cast<S*>(pass_.grad_biases[l - 1]);
      p.activation = network_.layers[l - 1].activation;
      if (p.activation.kind != identity_kind) {
        p.saved = strided<S>(pass_.saved[l - 1]);
      }
      if (bias) p.column_sums = carver.take<C>(found.row_tiles * p.n);
    }
    if (launches_) {
      Kernels<S>::multiply(context_, found, Epilogue::dgrad, p);
      if (bias) Kernels<S>::sum_partials(context_, p.column_sums, found.row_tiles, p.n, bias);
    }
    return gapless(p.output, layer.in_features);
  }

  const Context& context_;
  const BackwardPass& pass_;
  const Network& network_;
  const size_t last_;
  const size_t lowest_;
  bool launches_ = false;
  S* gradients_[2] = {};
  S* input_ = nullptr;
};

}  // namespace

// The files of dtypes/ are compiled for the same architectures, so that one kernel stands for all.
const char* obstacle() { return Kernels<float>::obstacle(); }

void forward(const Context& context, const ForwardPass& pass) {
  if (goes_fused(context, pass.network)) return forward_fused(context, pass);
  with_storage(pass.network.dtype, [&](auto storage) { forward_of<decltype(storage)>(context, pass); });
}

void backward(const Context& context, const BackwardPass& pass) {
  if (goes_fused(context, pass.network)) return backward_fused(context, pass);
  with_storage(pass.network.dtype, [&](auto storage) {
    Backward<decltype(storage)> backward(context, pass);
    with_memory(context, [&](Carver& carver, bool run) { backward.run(carver, run); });
  });
}

}  // namespace fastmlp::cuda
