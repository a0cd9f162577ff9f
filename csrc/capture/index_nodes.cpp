// Checks what nodes of indices are made of, and turns their tensors into pointers at each run.
#include "index_nodes.h"

#include <utility>

#include "../tensors/dtypes.h"
#include "checks.h"

namespace fastmlp {
namespace {

// Without its memory, which runs fill in.
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

GatherNode::GatherNode(at::Tensor input, at::Tensor index, at::Tensor output)
    : input_(std::move(input)), index_(std::move(index)), output_(std::move(output)) {
  check_numbers(input_, "input");
  check_numbers(output_, "output");
  check_like(output_, "output", {input_.size(0), output_.size(1)}, input_);
  check_gapless(output_, "output");
  check_index(index_, "index", output_.sizes(), input_);
  shape_ = {*dtype_of(input_.scalar_type()),
            input_.size(0),
            input_.size(1),
            index_.size(1),
            strides_of(input_),
            strides_of(index_)};
  pass_ = known(operations_for(input_).gather, input_, "gather");
}

void GatherNode::run() {
  GatherPass pass = shape_;
  pass.input.data = input_.data_ptr();
  pass.index.data = index_.data_ptr();
  pass.output = output_.data_ptr();
  if (const int64_t* const outside = pass_(pass)) raise_outside(name(), *outside, pass.columns);
}

ScatterNode::ScatterNode(std::optional<at::Tensor> before, at::Tensor index, at::Tensor source, at::Tensor output,
                         bool adds)
    : before_(std::move(before)), index_(std::move(index)), source_(std::move(source)), output_(std::move(output)) {
  check_numbers(output_, "output");
  check_numbers(source_, "source");
  check_gapless(output_, "output");
  if (before_) check_like(*before_, "before", output_.sizes(), output_);
  check_like(source_, "source", {output_.size(0), source_.size(1)}, output_);
  check_index(index_, "index", source_.sizes(), output_);
  shape_ = {*dtype_of(output_.scalar_type()),          output_.size(0),    output_.size(1),    index_.size(1), adds,
            before_ ? strides_of(*before_) : Matrix{}, strides_of(index_), strides_of(source_)};
  pass_ = known(operations_for(output_).scatter, output_, "scatter");
}

void ScatterNode::run() {
  ScatterPass pass = shape_;
  pass.before.data = pointer(before_);
  pass.index.data = index_.data_ptr();
  pass.source.data = source_.data_ptr();
  pass.output = output_.data_ptr();
  if (const int64_t* const outside = pass_(pass)) raise_outside(name(), *outside, pass.columns);
}

RowMaxNode::RowMaxNode(at::Tensor input, std::optional<at::Tensor> values, std::optional<at::Tensor> indices)
    : input_(std::move(input)), values_(std::move(values)), indices_(std::move(indices)) {
  check_numbers(input_, "input");
  if (values_) {
    check_like(*values_, "values", {input_.size(0), 1}, input_);
    check_gapless(*values_, "values");
  }
  if (indices_) {
    check_index(*indices_, "indices", {input_.size(0), 1}, input_);
    check_gapless(*indices_, "indices");
  }
  shape_ = {*dtype_of(input_.scalar_type()), input_.size(0), input_.size(1), strides_of(input_)};
  pass_ = known(operations_for(input_).row_max, input_, "max");
}

void RowMaxNode::run() {
  RowMaxPass pass = shape_;
  pass.input.data = input_.data_ptr();
  pass.values = pointer(values_);
  pass.indices = static_cast<int64_t*>(pointer(indices_));
  pass_(pass);
}

TakeRowsNode::TakeRowsNode(at::Tensor table, at::Tensor index, at::Tensor output, std::string operation)
    : table_(std::move(table)), index_(std::move(index)), output_(std::move(output)), operation_(std::move(operation)) {
  check_numbers(table_, "table");
  TORCH_CHECK_VALUE(table_.stride(1) == 1,
                    "fastmlp: table has gaps between columns, expected none; make it contiguous");
  check_numbers(output_, "output");
  check_like(output_, "output", {output_.size(0), table_.size(1)}, table_);
  check_gapless(output_, "output");
  check_index(index_, "index", {output_.size(0), 1}, table_);
  shape_ = {*dtype_of(table_.scalar_type()),
            table_.size(0),
            table_.size(1),
            index_.size(0),
            strides_of(table_),
            strides_of(index_)};
  pass_ = known(operations_for(table_).take_rows, table_, "rows by their numbers");
}

void TakeRowsNode::run() {
  TakeRowsPass pass = shape_;
  pass.table.data = table_.data_ptr();
  pass.index.data = index_.data_ptr();
  pass.output = output_.data_ptr();
  const int64_t* const outside = pass_(pass);
  TORCH_CHECK_INDEX(!outside, "fastmlp: ", name(), ": index ", *outside, " is out of range, expected 0 to ",
                    pass.rows - 1, ", because there are ", pass.rows, " rows; pass indices of rows that exist");
}

AddRowsNode::AddRowsNode(at::Tensor source, at::Tensor index, int64_t skipped, at::Tensor output)
    : source_(std::move(source)), index_(std::move(index)), output_(std::move(output)) {
  check_numbers(source_, "source");
  check_numbers(output_, "output");
  check_like(output_, "output", {output_.size(0), source_.size(1)}, source_);
  check_gapless(output_, "output");
  check_index(index_, "index", {source_.size(0), 1}, source_);
  shape_ = {*dtype_of(source_.scalar_type()),
            output_.size(0),
            output_.size(1),
            index_.size(0),
            skipped,
            strides_of(source_),
            strides_of(index_)};
  pass_ = known(operations_for(source_).add_rows, source_, "sums of rows by their numbers");
}

void AddRowsNode::run() {
  AddRowsPass pass = shape_;
  pass.source.data = source_.data_ptr();
  pass.index.data = index_.data_ptr();
  pass.output = output_.data_ptr();
  pass_(pass);
}

NllNode::NllNode(at::Tensor input, at::Tensor target, int64_t ignored, bool mean, at::Tensor loss, at::Tensor total)
    : input_(std::move(input)), target_(std::move(target)), loss_(std::move(loss)), total_(std::move(total)) {
  shape_ = {classes_of(input_, target_, ignored, mean), strides_of(input_)};
  check_like(loss_, "loss", {}, input_);
  check_like(total_, "total", {}, input_);
  pass_ = known(operations_for(input_).nll, input_, "nll_loss");
}

void NllNode::run() {
  NllPass pass = shape_;
  pass.input.data = input_.data_ptr();
  pass.classes.target.data = target_.data_ptr();
  pass.loss = loss_.data_ptr();
  pass.total = total_.data_ptr();
  if (const int64_t* const outside = pass_(pass)) raise_class(name(), *outside, pass.classes);
}

NllBackwardNode::NllBackwardNode(at::Tensor grad, at::Tensor target, at::Tensor total, int64_t ignored, bool mean,
                                 at::Tensor grad_input)
    : grad_(std::move(grad)), target_(std::move(target)), total_(std::move(total)), grad_input_(std::move(grad_input)) {
  shape_.classes = classes_of(grad_input_, target_, ignored, mean);
  check_gapless(grad_input_, "grad_input");
  check_like(grad_, "grad", {}, grad_input_);
  check_like(total_, "total", {}, grad_input_);
  pass_ = known(operations_for(grad_input_).nll_backward, grad_input_, "nll_loss");
}

void NllBackwardNode::run() {
  NllBackwardPass pass = shape_;
  pass.classes.target.data = target_.data_ptr();
  pass.grad = grad_.data_ptr();
  pass.total = total_.data_ptr();
  pass.grad_input = grad_input_.data_ptr();
  if (const int64_t* const outside = pass_(pass)) raise_class(name(), *outside, pass.classes);
}

}  // namespace fastmlp
