// Fills the structs of contract/problem.h from tensors, as passes.h describes. Called by the register files of devices.
// Must not check arguments, because checks.h has.
#include "passes.h"

#include <ATen/core/Tensor.h>

#include <algorithm>

#include "../contract/training_info.h"
#include "dtypes.h"

namespace fastmlp {
namespace {

Matrix matrix_of(const at::Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

// All leading dimensions as rows: a view where strides allow it, a copy where they do not.
c10::MaybeOwned<at::Tensor> as_rows(const at::Tensor& x, int64_t rows) {
  using Rows = c10::MaybeOwned<at::Tensor>;
  return x.dim() == 2 ? Rows::borrowed(x) : Rows::owned(x.reshape({rows, x.size(-1)}));
}

int64_t rows_of(const at::Tensor& input) {
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < input.dim(); d++) rows *= input.size(d);
  return rows;
}

// Raises RuntimeError if the device has no kernels for the dtype.
Network network_on(const char* device, const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  TORCH_CHECK(dtype_of(input.scalar_type()), "fastmlp: input has dtype ", dtype_name(input.scalar_type()),
              ", expected float32, float64, bfloat16 or float16, for which this build has ", device, " kernels");
  return network_of(stack, input, parameters);
}

// Of a layer that is a product.
void set_product(Layer& layer, const Stack& stack, size_t l, at::TensorList parameters) {
  const at::Tensor& weight = parameters[stack.weight(l)];
  layer.in_features = weight.size(1);
  layer.out_features = weight.size(0);
  layer.weight = matrix_of(weight);
  if (!stack.has_bias(l)) return;
  const at::Tensor& bias = parameters[stack.bias(l)];
  layer.bias = {bias.data_ptr(), bias.stride(0)};
}

// Vectors of batch normalisations are read without gaps.
const void* gapless_data(const at::Tensor& vector, c10::SmallVector<at::Tensor, 4>& copies) {
  if (vector.is_contiguous()) return vector.data_ptr();
  copies.push_back(vector.contiguous());
  return copies.back().data_ptr();
}

void set_norms(StepTensors& tensors, const Stack& stack, at::TensorList parameters, c10::ArrayRef<NormTensors> norms) {
  const auto data_of = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; };
  size_t next = 0;
  for (size_t l = 0; l < stack.layers(); l++) {
    Layer& layer = tensors.pass.backward.network.layers[l];
    if (layer.map != Map::batch_norm) continue;
    const NormTensors& own = norms[next++];
    layer.norm = {.running_mean = data_of(own.running_mean),
                  .running_variance = data_of(own.running_variance),
                  .of_batch = own.of_batch,
                  .momentum = own.momentum,
                  .eps = own.eps};
    if (stack.has_weight(l)) layer.norm.weight = gapless_data(parameters[stack.weight(l)], tensors.gapless);
    if (stack.has_bias(l)) layer.norm.bias = gapless_data(parameters[stack.bias(l)], tensors.gapless);
  }
}

}  // namespace

void set_gradients(BackwardPass& pass, const Stack& stack, at::TensorList grads) {
  const auto data_of = [&](size_t i) { return grads[i].defined() ? grads[i].data_ptr() : nullptr; };
  pass.grad_weights.reserve(stack.layers());
  pass.grad_biases.reserve(stack.layers());
  for (size_t l = 0; l < stack.layers(); l++) {
    pass.grad_weights.push_back(stack.has_weight(l) ? data_of(stack.weight(l)) : nullptr);
    pass.grad_biases.push_back(stack.has_bias(l) ? data_of(stack.bias(l)) : nullptr);
  }
}

Network network_of(const Stack& stack, const at::Tensor& input, at::TensorList parameters) {
  Network network;
  network.dtype = *dtype_of(input.scalar_type());
  network.rows = input.size(0);
  network.input = matrix_of(input);
  network.layers.resize(stack.layers());
  for (size_t l = 0; l < stack.layers(); l++) {
    const LayerSpec& spec = stack.specs()[l];
    Layer& layer = network.layers[l];
    layer.map = spec.map;
    if (spec.map == Map::product) {
      set_product(layer, stack, l, parameters);
    } else {
      layer.in_features = layer.out_features = l == 0 ? input.size(1) : network.layers[l - 1].out_features;
    }
    layer.activation = spec.activation;
    layer.dropout.p = spec.dropout;
    // Torch divides the numbers that it drew by 1 - p, in their dtype.
    const double left = 1 - spec.dropout;
    layer.dropout.scale = spec.dropout == 1 ? 0 : network.dtype == DType::float64 ? 1 / left : double(1 / float(left));
  }
  return network;
}

ForwardTensors forward_pass(const char* device, const Stack& stack, const at::Tensor& input, at::TensorList parameters,
                            const at::Tensor& output, at::TensorList hidden) {
  ForwardTensors tensors;
  tensors.input = as_rows(input, rows_of(input));
  ForwardPass& pass = tensors.pass;
  pass.network = network_on(device, stack, *tensors.input, parameters);
  size_t next = 0;
  for (Layer& layer : pass.network.layers) {
    if (layer.drops()) layer.dropout.kept = static_cast<uint8_t*>(hidden[next++].data_ptr());
  }
  if (!hidden.empty()) pass.kept.resize(stack.layers(), nullptr);
  for (size_t l = 0; next < hidden.size(); l++) pass.kept[l] = hidden[next++].data_ptr();
  pass.output = output.data_ptr();
  return tensors;
}

BackwardTensors backward_pass(const char* device, const Stack& stack, const at::Tensor& grad, const at::Tensor& input,
                              at::TensorList saved, at::TensorList parameters, at::TensorList grads) {
  const int64_t rows = rows_of(input);
  BackwardTensors tensors;
  tensors.input = as_rows(input, rows);
  // Dropout goes through elements as they lie.
  const auto gapless = [&](c10::MaybeOwned<at::Tensor> x) {
    using Rows = c10::MaybeOwned<at::Tensor>;
    return stack.masks() == 0 || x->is_contiguous() ? std::move(x) : Rows::owned(x->contiguous());
  };
  tensors.grad = gapless(as_rows(grad, rows));
  BackwardPass& pass = tensors.pass;
  pass.network = network_on(device, stack, *tensors.input, parameters);
  pass.grad_output = matrix_of(*tensors.grad);
  pass.saved.resize(stack.layers());
  size_t next = 0;
  for (Layer& layer : pass.network.layers) {
    if (!layer.drops()) continue;
    tensors.masks.push_back(gapless(as_rows(saved[next++], rows)));
    layer.dropout.kept = static_cast<uint8_t*>(tensors.masks.back()->data_ptr());
  }
  for (size_t l = 0; next < saved.size(); l++) {
    tensors.saved.push_back(gapless(as_rows(saved[next++], rows)));
    pass.saved[l] = matrix_of(*tensors.saved.back());
  }
  pass.grad_input = grads[0].defined() ? grads[0].data_ptr() : nullptr;
  set_gradients(pass, stack, grads.slice(1));
  return tensors;
}

StepTensors step_pass(const char* device, const Stack& stack, const at::Tensor& input, at::TensorList parameters,
                      const LossSpec& spec, const at::Tensor& target, const at::Tensor& weight,
                      c10::ArrayRef<NormTensors> norms, at::TensorList grads) {
  StepTensors tensors;
  tensors.input = as_rows(input, rows_of(input));
  // Only products read rows with gaps.
  if (stack.specs()[0].map != Map::product && !tensors.input->is_contiguous())
    tensors.input = c10::MaybeOwned<at::Tensor>::owned(tensors.input->contiguous());
  StepPass& pass = tensors.pass;
  pass.backward.network = network_on(device, stack, *tensors.input, parameters);
  set_norms(tensors, stack, parameters, norms);
  set_gradients(pass.backward, stack, grads);
  Network& network = pass.backward.network;
  // Where no row has an output, rows that are all the same give what one of them gives. They take no memory, so that
  // there may be any number of them.
  if (network.layers.back().out_features == 0 && (network.layers[0].in_features == 0 || network.input.row_stride == 0))
    network.rows = std::min<int64_t>(network.rows, 1);
  pass.targets.spec = spec;
  if (loss_info(spec.kind).takes_classes) {
    pass.targets.classes = target.const_data_ptr<int64_t>();
  } else {
    pass.targets.target = target.data_ptr();
  }
  pass.targets.weight = weight.defined() ? weight.data_ptr() : nullptr;
  return tensors;
}

c10::SmallVector<int64_t, 5> sizes_with(const at::Tensor& input, int64_t features) {
  c10::SmallVector<int64_t, 5> sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = features;
  return sizes;
}

}  // namespace fastmlp
