// The table of direct.h: kernels of torch for the CPU by the names of their operators. Called by tape.cpp when a call
// is added. A line of it saves the dispatcher's work at each replay, and must be an operator's own kernel, with the
// arguments of its schema.
#include "direct.h"

#include <ATen/ATen.h>
#include <ATen/CPUFunctions.h>
#include <ATen/core/boxing/impl/make_boxed_from_unboxed_functor.h>

#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>

namespace fastmlp {
namespace {

// Tensors as they lie; of all else a copy, because unpacking a value empties it.
template <class Type> decltype(auto) argument(c10::IValue& value) {
  if constexpr (std::is_reference_v<Type>) {
    return c10::impl::ivalue_to_arg<Type, false>::call(value);
  } else {
    c10::IValue copy = value;
    return c10::impl::ivalue_to_arg<Type, false>::call(copy);
  }
}

template <class Function> struct Caller;
template <class Return, class... Args> struct Caller<Return (*)(Args...)> {
  template <Return (*function)(Args...)> static void call(torch::jit::Stack& arguments) {
    call_with<function>(arguments, std::index_sequence_for<Args...>());
  }

 private:
  template <Return (*function)(Args...), size_t... index>
  static void call_with(torch::jit::Stack& arguments, std::index_sequence<index...>) {
    function(argument<typename c10::impl::decay_if_not_tensor<Args>::type>(arguments[index])...);
  }
};

template <auto function> Direct* direct() { return &Caller<decltype(function)>::template call<function>; }

}  // namespace

Direct* direct_call(const c10::OperatorName& name) {
  using at::Tensor;
  static const std::unordered_map<std::string, Direct*> all = {
      {"aten::_log_softmax.out", direct<&at::cpu::_log_softmax_outf>()},
      {"aten::_log_softmax_backward_data.out", direct<&at::cpu::_log_softmax_backward_data_outf>()},
      {"aten::_softmax.out", direct<&at::cpu::_softmax_outf>()},
      {"aten::add.out", direct<&at::cpu::add_outf>()},
      {"aten::addmm.out", direct<&at::cpu::addmm_outf>()},
      {"aten::cos.out", direct<&at::cpu::cos_outf>()},
      {"aten::exp.out", direct<&at::cpu::exp_outf>()},
      {"aten::gelu.out", direct<&at::cpu::gelu_outf>()},
      {"aten::gelu_backward.grad_input", direct<&at::cpu::gelu_backward_outf>()},
      {"aten::leaky_relu.out", direct<&at::cpu::leaky_relu_outf>()},
      {"aten::leaky_relu_backward.grad_input", direct<&at::cpu::leaky_relu_backward_outf>()},
      {"aten::log.out", direct<&at::cpu::log_outf>()},
      {"aten::maximum.out", direct<&at::cpu::maximum_outf>()},
      {"aten::minimum.out", direct<&at::cpu::minimum_outf>()},
      {"aten::mm.out", direct<&at::cpu::mm_outf>()},
      {"aten::mse_loss.out", direct<&at::cpu::mse_loss_outf>()},
      {"aten::mse_loss_backward.grad_input", direct<&at::cpu::mse_loss_backward_outf>()},
      {"aten::mul.out", direct<&at::cpu::mul_outf>()},
      {"aten::neg.out", direct<&at::cpu::neg_outf>()},
      {"aten::reciprocal.out", direct<&at::cpu::reciprocal_outf>()},
      {"aten::sigmoid.out", direct<&at::cpu::sigmoid_outf>()},
      {"aten::sigmoid_backward.grad_input", direct<&at::cpu::sigmoid_backward_outf>()},
      {"aten::silu.out", direct<&at::cpu::silu_outf>()},
      {"aten::silu_backward.grad_input", direct<&at::cpu::silu_backward_outf>()},
      {"aten::sin.out", direct<&at::cpu::sin_outf>()},
      {"aten::softplus.out", direct<&at::cpu::softplus_outf>()},
      {"aten::softplus_backward.grad_input", direct<&at::cpu::softplus_backward_outf>()},
      {"aten::sqrt.out", direct<&at::cpu::sqrt_outf>()},
      {"aten::sub.out", direct<&at::cpu::sub_outf>()},
      {"aten::tanh.out", direct<&at::cpu::tanh_outf>()},
      {"aten::tanh_backward.grad_input", direct<&at::cpu::tanh_backward_outf>()},
      {"aten::threshold_backward.grad_input", direct<&at::cpu::threshold_backward_outf>()},
      {"aten::where.self_out", direct<&at::cpu::where_outf>()},
      {"aten::sum.IntList_out",
       direct<static_cast<Tensor& (*)(const Tensor&, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>,
                                      Tensor&)>(&at::cpu::sum_outf)>()},
      {"aten::mean.out",
       direct<static_cast<Tensor& (*)(const Tensor&, at::OptionalIntArrayRef, bool, std::optional<at::ScalarType>,
                                      Tensor&)>(&at::cpu::mean_outf)>()},
      {"aten::div.out", direct<static_cast<Tensor& (*)(const Tensor&, const Tensor&, Tensor&)>(&at::cpu::div_outf)>()},
      {"aten::pow.Tensor_Scalar_out",
       direct<static_cast<Tensor& (*)(const Tensor&, const at::Scalar&, Tensor&)>(&at::cpu::pow_outf)>()},
      {"aten::clamp.out",
       direct<static_cast<Tensor& (*)(const Tensor&, const std::optional<at::Scalar>&, const std::optional<at::Scalar>&,
                                      Tensor&)>(&at::cpu::clamp_outf)>()},
      {"aten::lerp.Scalar_out",
       direct<static_cast<Tensor& (*)(const Tensor&, const Tensor&, const at::Scalar&, Tensor&)>(
           &at::cpu::lerp_outf)>()},
      {"aten::gt.Scalar_out",
       direct<static_cast<Tensor& (*)(const Tensor&, const at::Scalar&, Tensor&)>(&at::cpu::gt_outf)>()},
      {"aten::lt.Scalar_out",
       direct<static_cast<Tensor& (*)(const Tensor&, const at::Scalar&, Tensor&)>(&at::cpu::lt_outf)>()},
      {"aten::ge.Scalar_out",
       direct<static_cast<Tensor& (*)(const Tensor&, const at::Scalar&, Tensor&)>(&at::cpu::ge_outf)>()},
      {"aten::le.Scalar_out",
       direct<static_cast<Tensor& (*)(const Tensor&, const at::Scalar&, Tensor&)>(&at::cpu::le_outf)>()},
      {"aten::eq.Tensor_out",
       direct<static_cast<Tensor& (*)(const Tensor&, const Tensor&, Tensor&)>(&at::cpu::eq_outf)>()},
      {"aten::add_.Tensor",
       direct<static_cast<Tensor& (*)(Tensor&, const Tensor&, const at::Scalar&)>(&at::cpu::add_)>()},
      {"aten::mul_.Tensor", direct<static_cast<Tensor& (*)(Tensor&, const Tensor&)>(&at::cpu::mul_)>()},
      {"aten::lerp_.Scalar",
       direct<static_cast<Tensor& (*)(Tensor&, const Tensor&, const at::Scalar&)>(&at::cpu::lerp_)>()},
  };
  const auto found = all.find(c10::toString(name));
  return found == all.end() ? nullptr : found->second;
}

}  // namespace fastmlp
