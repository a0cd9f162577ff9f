// The two directions between torch's dtypes and the contract's, and the words of errors (dtypes.h).
#include "dtypes.h"

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <array>
#include <limits>

namespace fastmlp {

std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      return std::nullopt;
  }
}

at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return at::kFloat;
    case DType::float64:
      return at::kDouble;
    case DType::bfloat16:
      return at::kBFloat16;
    case DType::float16:
      return at::kHalf;
  }
  __builtin_unreachable();
}

double largest_of(DType dtype) {
  switch (dtype) {
    case DType::float32:
      return std::numeric_limits<float>::max();
    case DType::float64:
      return std::numeric_limits<double>::max();
    case DType::bfloat16:
      return double(std::numeric_limits<c10::BFloat16>::max());
    case DType::float16:
      return double(std::numeric_limits<c10::Half>::max());
  }
  __builtin_unreachable();
}

const char* dtype_name(at::ScalarType dtype) {
  constexpr auto count = size_t(at::ScalarType::Undefined);  // the last one
  static const std::array<std::string, count> names = [] {
    std::array<std::string, count> all;
    for (size_t i = 0; i < all.size(); i++) {
      all[i] = "torch." + std::string(c10::getDtypeNames(at::ScalarType(i)).first);
    }
    return all;
  }();
  return size_t(dtype) < count ? names[size_t(dtype)].c_str() : "an undefined dtype";
}

std::string cast_to(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return ".float()";
    case at::kDouble:
      return ".double()";
    case at::kHalf:
      return ".half()";
    case at::kBFloat16:
      return ".bfloat16()";
    default:
      return std::string(".to(") + dtype_name(dtype) + ')';
  }
}

}  // namespace fastmlp
