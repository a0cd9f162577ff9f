// Names, parameters and saving rule of every activation of activation.h, as data for baseline
// code: argument checks, allocation and the Python side. Computes no activation.
#pragma once

#include <type_traits>

#include "activation.h"

namespace fastmlp {

struct ActivationInfo {
  const char* name;
  const ParameterInfo* parameters;  // two; unused ones have no name
  bool keeps_output;                // backward reads the output; otherwise the pre-activation
};

template <class A, class... Others> constexpr int kind_in(ActivationList<Others...>) {
  const bool same[] = {std::is_same_v<A, Others>...};
  int kind = 0;
  while (!same[kind]) kind++;
  return kind;
}

constexpr int identity_kind = kind_in<Identity>(Activations{});
constexpr int relu_kind = kind_in<Relu>(Activations{});

const ActivationInfo& activation_info(int kind);

inline bool keeps_output(const ActivationSpec& spec) { return activation_info(spec.kind).keeps_output; }

}  // namespace fastmlp
