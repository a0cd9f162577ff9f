// Batches for steps that keep none: rows of a tensor of the host, copied into memory that each batch writes again. Used
// by TrainStep::run_all (train_step.cpp), with the GIL.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

namespace fastmlp {

// Whether rows can be copied as bytes: a plain tensor of the host without a gradient, whose rows are gapless.
bool has_plain_rows(PyObject* object);

class Rows {
 public:
  // data: of which has_plain_rows() is true. most: rows that a batch has at most.
  Rows(const at::Tensor& data, int64_t most);

  // Copies the rows with these indices, which must be in range. The batch, in the same object each time: only who keeps
  // it no longer than until the next call may have it.
  PyObject* take(const int64_t* indices, int64_t count);

 private:
  at::Tensor data_;
  c10::SmallVector<int64_t, 5> sizes_, strides_;  // that data had
  size_t row_;                                    // bytes
  at::Tensor batch_;
  py::object object_;
};

}  // namespace fastmlp
