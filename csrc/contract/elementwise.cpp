// Turns the lists of element_operations.h and activation.h into the table behind element_operations(). Must stay
// baseline code, and computes nothing.
#include "elementwise.h"

#include "activation_info.h"
#include "element_operations.h"

namespace fastmlp {
namespace {

template <class... O> std::vector<ElementOperation> all_of(OperationList<O...>) {
  return {{O::name, O::operands, O::scalars}...};
}

int scalars_of(const ActivationInfo& info) {
  int count = 0;
  while (count < 2 && info.parameters[count].name) count++;
  return count;
}

std::vector<ElementOperation> make_table() {
  std::vector<ElementOperation> all = all_of(ElementOperations{});
  for (const auto& [prefix, operands] : {std::pair("value_", 1), std::pair("gradient_", 2)}) {
    for (int kind = 0; kind < Activations::size; kind++) {
      const ActivationInfo& info = activation_info(kind);
      all.push_back({std::string(prefix) + info.name, operands, scalars_of(info)});
    }
  }
  all.push_back({"bce_with_logits", 2, 0});
  for (const char* name : {"round_bfloat16", "round_float16"}) all.push_back({name, 1, 0, true});
  return all;
}

}  // namespace

const std::vector<ElementOperation>& element_operations() {
  static const std::vector<ElementOperation> all = make_table();
  return all;
}

}  // namespace fastmlp
