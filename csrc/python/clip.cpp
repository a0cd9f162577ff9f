// Which gradients go to the kernels, and the arithmetic of torch.nn.utils on the norm. Called as clip.h says.
// Everything is decided before anything is written, so that torch's own function can do what is not for the kernels.
#include "clip.h"

#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/profiler/api.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../tensors/borrowed.h"
#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "gil.h"
#include "objects.h"
#include "route.h"

namespace fastmlp {
namespace {

// Gradients of one device that lie apart from each other, and what its kernels are told of them.
struct Clippable {
  const DeviceOperations* operations;
  std::vector<Gradient> all;
  int64_t elements = 0;

  bool add(const at::Tensor& gradient) {
    const std::optional<DType> dtype = dtype_of(gradient.scalar_type());
    if (!dtype || !is_plain(gradient) || operations_on(gradient.device().type()) != operations ||
        gradient.requires_grad() || gradient.is_inference() || !gradient.is_non_overlapping_and_dense())
      return false;
    all.push_back({*dtype, gradient.numel(), gradient.mutable_data_ptr()});
    elements += gradient.numel();
    return true;
  }

  // Whether one gradient has memory of another, which torch would then write twice.
  bool overlap() const {
    c10::SmallVector<std::pair<uintptr_t, uintptr_t>, 32> extents;
    for (const Gradient& gradient : all) {
      const auto begin = reinterpret_cast<uintptr_t>(gradient.data);
      const size_t size = c10::elementSize(scalar_type_of(gradient.dtype));
      if (gradient.n > 0) extents.emplace_back(begin, begin + size_t(gradient.n) * size);
    }
    std::sort(extents.begin(), extents.end());
    for (size_t i = 1; i < extents.size(); i++) {
      if (extents[i].first < extents[i - 1].second) return true;
    }
    return false;
  }
};

std::optional<Clippable> clippable(at::TensorList gradients) {
  if (gradients.empty()) return std::nullopt;
  Clippable found{operations_on(gradients.front().device().type()), {}};
  if (!found.operations || !found.operations->gradient_norm) return std::nullopt;
  found.all.reserve(gradients.size());
  for (const at::Tensor& gradient : gradients) {
    if (!found.add(gradient)) return std::nullopt;
  }
  if (found.overlap()) return std::nullopt;
  return found;
}

// The gradient whose dtype the norm of all has in torch, which is the one that all are promoted to; null if none has
// it.
const at::Tensor* like_norm(at::TensorList gradients) {
  at::ScalarType dtype = gradients.front().scalar_type();
  for (const at::Tensor& gradient : gradients) dtype = at::promoteTypes(dtype, gradient.scalar_type());
  for (const at::Tensor& gradient : gradients) {
    if (gradient.scalar_type() == dtype) return &gradient;
  }
  return nullptr;
}

// max_norm / (norm + 1e-6), at most 1. Torch divides by multiplying with the reciprocal, and rounds to the dtype of the
// norm after each operation.
template <class T> double coefficient(T norm, double max_norm) {
  using Wide = at::opmath_type<T>;
  const T sum = T(Wide(norm) + Wide(T(1e-6)));
  const T reciprocal = T(Wide(1) / Wide(sum));
  const T factor = T(Wide(reciprocal) * Wide(max_norm));
  return double(factor) > 1 ? 1 : double(factor);
}

void count_writes(at::TensorList gradients) {
  for (const at::Tensor& gradient : gradients) gradient.unsafeGetTensorImpl()->bump_version();
}

// Whether torch's own functions have to be called, because something sees their operations or changes what they do.
bool is_watched() {
  return !no_mode_is_active() || forward_mode_is_open() || torch::profiler::impl::profilerEnabled() ||
         c10::InferenceMode::is_enabled() || at::autocast::is_autocast_enabled(host.type()) ||
         at::globalContext().deterministicAlgorithms();
}

// Adds the gradient of an object, if it has one; false if the object, or its gradient, is of a class of its own.
bool add_gradient(PyObject* parameter, Borrowed& gradients) {
  if (!THPVariable_CheckExact(parameter)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(parameter);
  // Torch warns of reading what never gets a gradient.
  if (!tensor.is_leaf() && !tensor.retains_grad()) return false;
  const at::Tensor& gradient = tensor.grad();
  if (!gradient.defined()) return true;
  const auto object = py::reinterpret_steal<py::object>(THPVariable_Wrap(gradient));
  if (!THPVariable_CheckExact(object.ptr())) return false;
  gradients.push_back(gradient);
  return true;
}

bool add_gradients(PyObject* parameters, Borrowed& gradients) {
  if (THPVariable_Check(parameters)) return add_gradient(parameters, gradients);
  const c10::ArrayRef<PyObject*> all = items_of(parameters);
  return std::all_of(all.begin(), all.end(), [&](PyObject* one) { return add_gradient(one, gradients); });
}

std::optional<NormOrder> order_of(PyObject* norm_type) {
  const std::optional<double> order = number_of(norm_type);
  if (order == 2) return NormOrder::two;
  if (order == std::numeric_limits<double>::infinity() || is_text(norm_type, "inf")) return NormOrder::infinity;
  return std::nullopt;
}

}  // namespace

std::optional<at::Tensor> clip_to_norm(at::TensorList gradients, double max_norm, NormOrder order,
                                       bool must_be_finite) {
  const std::optional<Clippable> found = clippable(gradients);
  if (!found) return std::nullopt;
  // Torch raises for the largest magnitude of nothing.
  const auto is_empty = [](const Gradient& gradient) { return gradient.n == 0; };
  if (order == NormOrder::infinity && std::any_of(found->all.begin(), found->all.end(), is_empty)) return std::nullopt;
  const at::Tensor* const like = like_norm(gradients);
  if (!like) return std::nullopt;
  const at::Tensor result = found->operations->empty({}, *like);
  ReleasedGil released(found->elements > elements_worth_releasing, [&](Held& held) { held.take(gradients); });
  const bool done = AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, like->scalar_type(), "clip_to_norm", [&] {
    const scalar_t norm = scalar_t(found->operations->gradient_norm(found->all, order));
    if (must_be_finite && !std::isfinite(double(norm))) return false;
    *result.mutable_data_ptr<scalar_t>() = norm;
    found->operations->scale_gradients(found->all, coefficient(norm, max_norm));
    return true;
  });
  released.end();
  if (!done) return std::nullopt;
  count_writes(gradients);
  return result;
}

bool clip_to_value(at::TensorList gradients, double limit) {
  const std::optional<Clippable> found = clippable(gradients);
  if (!found || std::isnan(limit)) return false;
  // Torch decides about numbers that a dtype cannot hold.
  const auto exceeds = [&](const Gradient& one) {
    return std::isfinite(limit) && std::abs(limit) > largest_of(one.dtype);
  };
  if (std::any_of(found->all.begin(), found->all.end(), exceeds)) return false;
  ReleasedGil released(found->elements > elements_worth_releasing, [&](Held& held) { held.take(gradients); });
  found->operations->clamp_gradients(found->all, limit);
  released.end();
  count_writes(gradients);
  return true;
}

std::optional<at::Tensor> clip_grad_norm(const py::object& parameters, const py::object& max_norm,
                                         const py::object& norm_type, const py::object& error_if_nonfinite) {
  const std::optional<double> limit = number_of(max_norm.ptr());
  const std::optional<NormOrder> order = order_of(norm_type.ptr());
  Borrowed gradients;
  if (!limit || !order || is_watched() || !add_gradients(parameters.ptr(), gradients)) return std::nullopt;
  return clip_to_norm(gradients, *limit, *order, is_true(error_if_nonfinite.ptr()));
}

bool clip_grad_value(const py::object& parameters, const py::object& clip_value) {
  const std::optional<double> limit = number_of(clip_value.ptr());
  Borrowed gradients;
  if (!limit || is_watched() || !add_gradients(parameters.ptr(), gradients)) return false;
  return clip_to_value(gradients, *limit);
}

}  // namespace fastmlp
