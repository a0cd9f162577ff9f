// What a device can do, as function types: devices.h keeps a pointer to each that a device has. The register files of
// the devices define such functions, most of them by operations.h; the dispatcher, Python and TrainStep call them.
// Arguments have been checked by whoever calls a function that ends in _into.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../contract/clip.h"
#include "../contract/derivatives.h"
#include "../contract/elementwise.h"
#include "../contract/indices.h"
#include "../contract/loss.h"
#include "../contract/product.h"
#include "../contract/rows.h"
#include "../contract/update.h"
#include "stack.h"

namespace fastmlp {

using Tensors = std::vector<at::Tensor>;

namespace operation {

// y and what backward needs besides it (Stack::hidden tensors). Dropout draws from the device's default generator, as
// torch.nn.Dropout does.
using Forward = std::tuple<at::Tensor, Tensors>(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
// y alone.
using Infer = at::Tensor(const Stack& stack, const at::Tensor& input, at::TensorList parameters);
// One gradient for the input and one for each parameter; undefined where not needed.
using Backward = Tensors(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                         at::TensorList parameters, const std::vector<bool>& needs);

// The same into memory of the caller, row-major without gaps. `hidden` begins with what has been drawn for layers that
// drop; no more than that means that nothing is kept. An undefined gradient is not computed.
using ForwardInto = void(const Stack& stack, const at::Tensor& input, at::TensorList parameters,
                         const at::Tensor& output, at::TensorList hidden);
using BackwardInto = void(const Stack& stack, const at::Tensor& grad, const at::Tensor& input, at::TensorList saved,
                          at::TensorList parameters, at::TensorList grads);

// Memory for a result: not initialised, row-major without gaps, of the dtype and device of `like`.
using Empty = at::Tensor(at::IntArrayRef sizes, const at::Tensor& like);

// Forward, loss and backward at once: returns the loss, which has no dimension, and writes the gradients that are
// defined. The target of a loss of classes holds these, in int64; those that do not exist raise IndexError before
// anything is written. An undefined loss, and gradients of no use, if the loss takes probabilities and some output is
// none. `weight` is undefined where there is none. What batch normalisations have besides parameters is in `norms`, one
// for each, in order; running statistics are moved. Dropout draws from the device's default generator, as
// torch.nn.Dropout does. `memory` is kept by the caller for the next call.
using TrainInto = at::Tensor(const Stack& stack, const at::Tensor& input, at::TensorList parameters,
                             const LossSpec& spec, const at::Tensor& target, const at::Tensor& weight,
                             c10::ArrayRef<NormTensors> norms, at::TensorList grads, at::Tensor& memory);

// A step of an optimizer: moves all parameters, whose memory is on the device.
using UpdateAll = void(const std::vector<Update>& updates, c10::Device device);

// Clipping, of gradients whose memory is on the device: the norm of all elements together, in float64; their products
// with a factor; and clamping to at least -limit, then to at most limit.
using GradientNorm = double(const std::vector<Gradient>& gradients, NormOrder order);
using ScaleGradients = void(const std::vector<Gradient>& gradients, double factor);
using ClampGradients = void(const std::vector<Gradient>& gradients, double limit);

// Derivatives along the input, and their gradients, whose memory is on the device.
using Derivatives = void(const DerivativesForward& pass);
using DerivativesGradient = void(const DerivativesBackward& pass);

// A product by itself, whose memory is on the device.
using Multiply = void(const ProductPass& pass);
// An elementwise program, ready to run. It has been checked.
using PlanElementwise = std::unique_ptr<ElementwiseRun>(const ElementProgram& program);
// Fills a tensor of float32 or float64, whose elements lie in memory without gaps, as Tensor.bernoulli_ does. `none`
// is the device's default generator.
using Bernoulli = void(const at::Tensor& tensor, double p, const std::optional<at::Generator>& generator);
// Whether Bernoulli gives the numbers that torch's own operator gives in this installation, and leaves the generator
// where that leaves it; otherwise nobody may put one for the other.
using DrawsAsTorch = bool();

// Passes over rows, whose memory is on the device.
using LayerNorm = void(const LayerNormPass& pass);
using LayerNormBackward = void(const LayerNormBackwardPass& pass);
using BatchNorm = void(const BatchNormPass& pass);
using BatchNormBackward = void(const BatchNormBackwardPass& pass);
using Softmax = void(const SoftmaxPass& pass);
using SoftmaxBackward = void(const SoftmaxBackwardPass& pass);
// Up to how many columns these are faster than torch's operators.
using SoftmaxColumns = int64_t();

// Passes over indices. Those that return something return null, or the first index that is out of range, and then have
// written nothing.
using Gather = const int64_t*(const GatherPass& pass);
using Scatter = const int64_t*(const ScatterPass& pass);
using RowMax = void(const RowMaxPass& pass);
using TakeRows = const int64_t*(const TakeRowsPass& pass);
using AddRows = void(const AddRowsPass& pass);
using Nll = const int64_t*(const NllPass& pass);
using NllBackward = const int64_t*(const NllBackwardPass& pass);

}  // namespace operation
}  // namespace fastmlp
