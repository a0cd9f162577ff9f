// What the project says of dtypes: which ones have kernels, and how errors write them. Used wherever torch's dtypes
// meet the contract's, or an error names one. Must know nothing of devices: all of them have kernels for the same
// dtypes.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>
#include <string>

#include "../contract/problem.h"

namespace fastmlp {

// None if there are no kernels for the dtype.
std::optional<DType> dtype_of(at::ScalarType type);
at::ScalarType scalar_type_of(DType dtype);
// The largest finite number.
double largest_of(DType dtype);

// As users write it: "torch.float32".
const char* dtype_name(at::ScalarType dtype);
// The call that converts a tensor or a module to the dtype: ".float()".
std::string cast_to(at::ScalarType dtype);

}  // namespace fastmlp
