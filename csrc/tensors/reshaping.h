// Calls that give the output of a network another shape, as squeeze(-1) does at the end of many a forward: which shape
// comes of them. The elements stay where they are. Used by python/frozen.cpp and python/train_step_read.cpp.
#pragma once

#include <ATen/core/DimVector.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastmlp {

class Reshaping {
 public:
  // A method of tensors, and its arguments in order, sizes one by one: "squeeze" without any or with a dimension,
  // "unsqueeze" with one, "flatten" with two, "unflatten" with a dimension and sizes, and "view" with sizes.
  using Call = std::pair<std::string, std::vector<int64_t>>;
  explicit Reshaping(const Call& call);

  // Raises where torch would.
  void apply(at::DimVector& shape) const;
  Call call() const;

 private:
  enum class Kind { squeeze, unsqueeze, flatten, unflatten, view };
  static constexpr const char* names[] = {"squeeze", "unsqueeze", "flatten", "unflatten", "view"};

  bool try_apply(at::DimVector& shape) const;

  Kind kind_;
  std::vector<int64_t> numbers_;
};

// One after another; most networks have none.
using Reshapings = std::vector<Reshaping>;

}  // namespace fastmlp
