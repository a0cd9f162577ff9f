// Checks what nodes of indices are made of, describes it to the device, and raises for an index out of range.
#include "index_nodes.h"

#include <utility>

#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "checks.h"

namespace fastmlp {
namespace {

// Without its memory, which the tape fills in.
Matrix strides_of(const at::Tensor& tensor) { return {nullptr, tensor.stride(0), tensor.stride(1)}; }

// Torch's operators of one dimension raise RuntimeError.
[[noreturn]] void raise_outside(const char* name, int64_t outside, int64_t columns) {
  TORCH_CHECK(false, "fastmlp: ", name, ": index ", outside, " is out of range, expected 0 to ", columns - 1,
              ", because the tensor's last dimension has size ", columns, "; pass indices of elements that exist");
}

[[noreturn]] void raise_class(const char* name, int64_t outside, const ClassesPass& of) {
  TORCH_CHECK_INDEX(false, "fastmlp: ", name, ": target holds class ", outside, ", expected 0 to ", of.columns - 1,
                    ", or ignore_index, ", of.ignored, "; pass classes that the input has columns for");
}

ClassesPass classes_of(const at::Tensor& matrix, const at::Tensor& target, int64_t ignored, bool mean) {
  check_numbers(matrix, "input");
  check_index(target, "target", {matrix.size(0), 1}, matrix);
  return {*dtype_of(matrix.scalar_type()), matrix.size(0), matrix.size(1), ignored, mean, strides_of(target)};
}

}  // namespace

GatherNode::GatherNode(const at::Tensor& input, const at::Tensor& index, const at::Tensor& output) {
  check_numbers(input, "input");
  check_numbers(output, "output");
  check_like(output, "output", {input.size(0), output.size(1)}, input);
  check_gapless(output, "output");
  check_index(index, "index", output.sizes(), input);
  operation_ = known(operations_for(input).gather, input, "gather");
  pass_ = {*dtype_of(input.scalar_type()),
           input.size(0),
           input.size(1),
           index.size(1),
           strides_of(input),
           strides_of(index)};
  keep(input, pass_.input.data);
  keep(index, pass_.index.data);
  keep(output, pass_.output);
}

void GatherNode::run() {
  if (const int64_t* const outside = operation_(pass_)) raise_outside(name(), *outside, pass_.columns);
}

ScatterNode::ScatterNode(const std::optional<at::Tensor>& before, const at::Tensor& index, const at::Tensor& source,
                         const at::Tensor& output, bool adds) {
  check_numbers(output, "output");
  check_numbers(source, "source");
  check_gapless(output, "output");
  if (before) check_like(*before, "before", output.sizes(), output);
  check_like(source, "source", {output.size(0), source.size(1)}, output);
  check_index(index, "index", source.sizes(), output);
  operation_ = known(operations_for(output).scatter, output, "scatter");
  pass_ = {*dtype_of(output.scalar_type()),         output.size(0),    output.size(1),    index.size(1), adds,
           before ? strides_of(*before) : Matrix{}, strides_of(index), strides_of(source)};
  keep(before, pass_.before.data);
  keep(index, pass_.index.data);
  keep(source, pass_.source.data);
  keep(output, pass_.output);
}

void ScatterNode::run() {
  if (const int64_t* const outside = operation_(pass_)) raise_outside(name(), *outside, pass_.columns);
}

RowMaxNode::RowMaxNode(const at::Tensor& input, const std::optional<at::Tensor>& values,
                       const std::optional<at::Tensor>& indices)
    : has_values_(values.has_value()) {
  check_numbers(input, "input");
  if (values) {
    check_like(*values, "values", {input.size(0), 1}, input);
    check_gapless(*values, "values");
  }
  if (indices) {
    check_index(*indices, "indices", {input.size(0), 1}, input);
    check_gapless(*indices, "indices");
  }
  operation_ = known(operations_for(input).row_max, input, "max");
  pass_ = {*dtype_of(input.scalar_type()), input.size(0), input.size(1), strides_of(input)};
  keep(input, pass_.input.data);
  keep(values, pass_.values);
  keep(indices, pass_.indices);
}

TakeRowsNode::TakeRowsNode(const at::Tensor& table, const at::Tensor& index, const at::Tensor& output,
                           std::string operation)
    : name_(std::move(operation)) {
  check_numbers(table, "table");
  TORCH_CHECK_VALUE(table.stride(1) == 1, "fastmlp: table has gaps between columns, expected none; make it contiguous");
  check_numbers(output, "output");
  check_like(output, "output", {output.size(0), table.size(1)}, table);
  check_gapless(output, "output");
  check_index(index, "index", {output.size(0), 1}, table);
  operation_ = known(operations_for(table).take_rows, table, "rows by their numbers");
  pass_ = {*dtype_of(table.scalar_type()),
           table.size(0),
           table.size(1),
           index.size(0),
           strides_of(table),
           strides_of(index)};
  keep(table, pass_.table.data);
  keep(index, pass_.index.data);
  keep(output, pass_.output);
}

void TakeRowsNode::run() {
  const int64_t* const outside = operation_(pass_);
  TORCH_CHECK_INDEX(!outside, "fastmlp: ", name(), ": index ", *outside, " is out of range, expected 0 to ",
                    pass_.rows - 1, ", because there are ", pass_.rows, " rows; pass indices of rows that exist");
}

AddRowsNode::AddRowsNode(const at::Tensor& source, const at::Tensor& index, int64_t skipped, const at::Tensor& output) {
  check_numbers(source, "source");
  check_numbers(output, "output");
  check_like(output, "output", {output.size(0), source.size(1)}, source);
  check_gapless(output, "output");
  check_index(index, "index", {source.size(0), 1}, source);
  operation_ = known(operations_for(source).add_rows, source, "sums of rows by their numbers");
  pass_ = {*dtype_of(source.scalar_type()),
           output.size(0),
           output.size(1),
           index.size(0),
           skipped,
           strides_of(source),
           strides_of(index)};
  keep(source, pass_.source.data);
  keep(index, pass_.index.data);
  keep(output, pass_.output);
}

NllNode::NllNode(const at::Tensor& input, const at::Tensor& target, int64_t ignored, bool mean, const at::Tensor& loss,
                 const at::Tensor& total) {
  pass_ = {classes_of(input, target, ignored, mean), strides_of(input)};
  check_like(loss, "loss", {}, input);
  check_like(total, "total", {}, input);
  operation_ = known(operations_for(input).nll, input, "nll_loss");
  keep(input, pass_.input.data);
  keep(target, pass_.classes.target.data);
  keep(loss, pass_.loss);
  keep(total, pass_.total);
}

void NllNode::run() {
  if (const int64_t* const outside = operation_(pass_)) raise_class(name(), *outside, pass_.classes);
}

NllBackwardNode::NllBackwardNode(const at::Tensor& grad, const at::Tensor& target, const at::Tensor& total,
                                 int64_t ignored, bool mean, const at::Tensor& grad_input) {
  pass_.classes = classes_of(grad_input, target, ignored, mean);
  check_gapless(grad_input, "grad_input");
  check_like(grad, "grad", {}, grad_input);
  check_like(total, "total", {}, grad_input);
  operation_ = known(operations_for(grad_input).nll_backward, grad_input, "nll_loss");
  keep(grad, pass_.grad);
  keep(target, pass_.classes.target.data);
  keep(total, pass_.total);
  keep(grad_input, pass_.grad_input);
}

void NllBackwardNode::run() {
  if (const int64_t* const outside = operation_(pass_)) raise_class(name(), *outside, pass_.classes);
}

}  // namespace fastmlp
