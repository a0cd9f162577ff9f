// Describes the tensors and instructions of a node of elementwise_node.h to the device that runs them.
#include "elementwise_node.h"

#include <algorithm>
#include <optional>

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"

namespace fastmlp {
namespace {

using Output = ElementwiseNode::Output;

// The dtype that is computed in: float64 if floating tensors are of it, float32 otherwise.
at::ScalarType computed_dtype(const std::vector<at::Tensor>& inputs, const std::vector<Output>& outputs) {
  std::optional<at::ScalarType> found;
  const auto look = [&](const at::Tensor& tensor) {
    const at::ScalarType dtype = tensor.scalar_type();
    if (!at::isFloatingType(dtype)) return;
    TORCH_CHECK_TYPE(dtype_of(dtype), "fastmlp: elementwise: a tensor is of ", dtype_name(dtype),
                     ", expected torch.float32, torch.float64, torch.bfloat16 or torch.float16");
    TORCH_CHECK_TYPE(!found || (*found == at::kDouble) == (dtype == at::kDouble),
                     "fastmlp: elementwise: tensors are of ", dtype_name(*found), " and ", dtype_name(dtype),
                     ", expected torch.float64 for all or for none");
    found = dtype;
  };
  for (const at::Tensor& tensor : inputs) look(tensor);
  for (const Output& output : outputs) look(output.tensor);
  return found == at::kDouble ? at::kDouble : at::kFloat;
}

ElementKind kind_of(const at::Tensor& tensor, const char* role, bool integers) {
  if (tensor.scalar_type() == at::kBool) return ElementKind::boolean;
  if (integers && tensor.scalar_type() == at::kLong) return ElementKind::integer;
  TORCH_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()), "fastmlp: elementwise: an ", role, " is of ",
                   dtype_name(tensor.scalar_type()), ", expected a floating dtype",
                   integers ? ", torch.bool or torch.int64" : " or torch.bool");
  if (tensor.scalar_type() == at::kBFloat16) return ElementKind::bfloat16;
  return tensor.scalar_type() == at::kHalf ? ElementKind::float16 : ElementKind::number;
}

int number_of(const std::string& name) {
  const std::vector<ElementOperation>& all = element_operations();
  const auto found = std::find_if(all.begin(), all.end(), [&](const auto& one) { return one.name == name; });
  TORCH_CHECK_VALUE(found != all.end(), "fastmlp: elementwise: there is no operation ", name,
                    "; _C.elementwise_operations() names those that there are");
  return int(found - all.begin());
}

void check_register(int index, size_t registers) {
  TORCH_CHECK_VALUE(index >= 0 && size_t(index) < registers, "fastmlp: elementwise: register ", index,
                    " is read, expected 0 to ", int64_t(registers) - 1, ", those that come before");
}

ElementEnd end_of(const std::string& name) {
  if (name == "store") return ElementEnd::store;
  if (name == "sum") return ElementEnd::sum;
  if (name == "max") return ElementEnd::max;
  if (name == "min") return ElementEnd::min;
  TORCH_CHECK_VALUE(false, "fastmlp: elementwise: an output must be a store, sum, max or min, got ", name);
}

ElementInstruction instruction_of(const ElementwiseNode::Instruction& from, DType dtype, size_t registers) {
  const int number = number_of(from.operation);
  const ElementOperation& operation = element_operations()[size_t(number)];
  TORCH_CHECK_TYPE(!operation.float32_only || dtype == DType::float32, "fastmlp: elementwise: ", from.operation,
                   " is asked for in torch.float64, expected torch.float32");
  TORCH_CHECK_VALUE(int(from.operands.size()) == operation.operands && int(from.scalars.size()) == operation.scalars,
                    "fastmlp: elementwise: ", from.operation, " has ", from.operands.size(), " operands and ",
                    from.scalars.size(), " scalars, expected ", operation.operands, " and ", operation.scalars);
  for (const int operand : from.operands) check_register(operand, registers);
  ElementInstruction instruction{number, from.operands, {}};
  if (from.scalars.size() > 0) instruction.scalars.a = from.scalars[0];
  if (from.scalars.size() > 1) instruction.scalars.b = from.scalars[1];
  return instruction;
}

ElementOutput output_of(const Output& from, size_t registers) {
  check_register(from.source, registers);
  const ElementEnd end = end_of(from.end);
  const ElementKind kind = kind_of(from.tensor, "output", false);
  TORCH_CHECK_TYPE(end == ElementEnd::store || kind != ElementKind::boolean, "fastmlp: elementwise: the output of a ",
                   from.end, " is of torch.bool, expected a floating dtype");
  for (int64_t d = 0; d < from.tensor.dim(); d++) {
    TORCH_CHECK_VALUE(end != ElementEnd::store || from.tensor.size(d) <= 1 || from.tensor.stride(d) != 0,
                      "fastmlp: elementwise: elements of an output that is stored share memory along dimension ", d,
                      ", expected a stride other than 0, or a reduction");
  }
  return {kind, from.tensor.strides().vec(), from.source, end, from.scale};
}

ElementProgram program_of(const std::vector<at::Tensor>& inputs,
                          const std::vector<ElementwiseNode::Instruction>& instructions,
                          const std::vector<Output>& outputs) {
  TORCH_CHECK_VALUE(!outputs.empty(), "fastmlp: elementwise: there are no outputs, expected one at least");
  ElementProgram program;
  program.dtype = *dtype_of(computed_dtype(inputs, outputs));
  const at::Tensor& first = outputs.front().tensor;
  program.sizes = first.sizes().vec();
  const auto check = [&](const at::Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.sizes() == first.sizes(), "fastmlp: elementwise: tensors are of shapes ", tensor.sizes(),
                      " and ", first.sizes(), ", expected one shape; expand them");
    TORCH_CHECK_VALUE(tensor.device() == first.device(), "fastmlp: elementwise: tensors are on ", tensor.device(),
                      " and ", first.device(), ", expected one device");
  };
  for (const at::Tensor& tensor : inputs) {
    check(tensor);
    program.inputs.push_back({kind_of(tensor, "input", true), tensor.strides().vec()});
  }
  size_t registers = inputs.size();
  for (const ElementwiseNode::Instruction& one : instructions)
    program.instructions.push_back(instruction_of(one, program.dtype, registers++));
  for (const Output& output : outputs) {
    check(output.tensor);
    program.outputs.push_back(output_of(output, registers));
  }
  return program;
}

}  // namespace

ElementwiseNode::ElementwiseNode(const std::vector<at::Tensor>& inputs, const std::vector<Instruction>& instructions,
                                 const std::vector<Output>& outputs) {
  const ElementProgram program = program_of(inputs, instructions, outputs);
  memory_.resize(inputs.size() + outputs.size());
  size_t next = 0;
  for (const at::Tensor& input : inputs) keep(input, memory_[next++]);
  for (const Output& output : outputs) keep(output.tensor, memory_[next++]);
  const at::Tensor& first = outputs.front().tensor;
  operation::PlanElementwise* const plan = operations_for(first).elementwise;
  TORCH_CHECK(plan, "fastmlp: elementwise: tensors are on ", first.device(),
              ", which has no kernels for runs of elementwise operations");
  run_ = plan(program);
}

}  // namespace fastmlp
