// Copies rows as rows.h says: byte by byte, whatever their dtype.
#include "rows.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>

#include "route.h"

namespace fastmlp {

bool has_plain_rows(PyObject* object) {
  if (!THPVariable_Check(object) || !is_plain_on_host(object)) return false;
  const at::Tensor& tensor = THPVariable_Unpack(object);
  if (tensor.dim() == 0 || tensor.requires_grad()) return false;
  return tensor.size(0) == 0 || tensor.narrow(0, 0, 1).is_contiguous();
}

Rows::Rows(const at::Tensor& data, int64_t most)
    : data_(data),
      sizes_(data.sizes().begin(), data.sizes().end()),
      strides_(data.strides().begin(), data.strides().end()) {
  c10::SmallVector<int64_t, 5> sizes = sizes_;
  sizes[0] = std::min(most, data.size(0));
  batch_ = at::empty(sizes, data.options());
  row_ = sizes[0] == 0 ? 0 : batch_.nbytes() / sizes[0];
  object_ = py::cast(batch_);
}

PyObject* Rows::take(const int64_t* indices, int64_t count) {
  // A hook of the optimizer's step may have changed them.
  TORCH_CHECK(data_.sizes().equals(sizes_) && data_.strides().equals(strides_),
              "fastmlp: a tensor of the data has changed its shape while a TrainStep was going through them");
  if (batch_.size(0) != count) {
    c10::SmallVector<int64_t, 5> sizes = sizes_;
    sizes[0] = count;
    batch_.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  }
  const size_t step = strides_[0] * data_.element_size();
  const std::byte* const from = static_cast<const std::byte*>(data_.const_data_ptr());
  std::byte* to = static_cast<std::byte*>(batch_.data_ptr());
  if (row_ > 0) {
    for (int64_t i = 0; i < count; i++, to += row_) std::memcpy(to, from + indices[i] * step, row_);
  }
  return object_.ptr();
}

}  // namespace fastmlp
