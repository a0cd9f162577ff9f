// Shapes of reshaping.h, by the rules of torch's methods.
#include "reshaping.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <optional>

namespace fastmlp {
namespace {

// A dimension counted from the front, of so many; none if it is not there.
std::optional<size_t> place_of(int64_t dim, size_t dims) {
  const int64_t count = int64_t(dims);
  if (dim < -count || dim >= count) return std::nullopt;
  return size_t(dim < 0 ? dim + count : dim);
}

std::optional<int64_t> product_of(c10::IntArrayRef sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) {
    if (__builtin_mul_overflow(product, size, &product)) return std::nullopt;
  }
  return product;
}

// Sizes of which one may be -1, which stands for what the others leave of `all` elements; none if they do not fit.
std::optional<at::DimVector> fitted(c10::IntArrayRef sizes, int64_t all) {
  at::DimVector found(sizes.begin(), sizes.end());
  const auto open = std::find(found.begin(), found.end(), -1);
  if (open != found.end()) *open = 1;
  if (std::any_of(found.begin(), found.end(), [](int64_t size) { return size < 0; })) return std::nullopt;
  const std::optional<int64_t> known = product_of(found);
  if (!known) return std::nullopt;
  if (open == found.end()) return *known == all ? std::optional(found) : std::nullopt;
  if (*known == 0 || all % *known != 0) return std::nullopt;
  *open = all / *known;
  return found;
}

void replace(at::DimVector& shape, size_t begin, size_t end, c10::IntArrayRef by) {
  at::DimVector changed(shape.begin(), shape.begin() + begin);
  changed.append(by.begin(), by.end());
  changed.append(shape.begin() + end, shape.end());
  shape = changed;
}

}  // namespace

Reshaping::Reshaping(const Call& call) : numbers_(call.second) {
  const auto found = std::find(std::begin(names), std::end(names), call.first);
  const size_t count = numbers_.size();
  kind_ = Kind(found - std::begin(names));
  const bool right = kind_ == Kind::squeeze     ? count <= 1
                     : kind_ == Kind::unsqueeze ? count == 1
                     : kind_ == Kind::flatten   ? count == 2
                     : kind_ == Kind::unflatten ? count >= 2
                                                : found != std::end(names);
  TORCH_CHECK_VALUE(right, "fastmlp: a network ends with the call ", call.first, " of ", count,
                    " numbers, which gives an output no other shape");
}

Reshaping::Call Reshaping::call() const { return {names[int(kind_)], numbers_}; }

// False, and the shape is of no use, if torch would raise.
bool Reshaping::try_apply(at::DimVector& shape) const {
  const size_t dims = shape.size();
  if (kind_ == Kind::view) {
    const std::optional<int64_t> all = product_of(shape);
    const std::optional<at::DimVector> sizes = all ? fitted(numbers_, *all) : std::nullopt;
    if (sizes) shape = *sizes;
    return sizes.has_value();
  }
  if (kind_ == Kind::squeeze && numbers_.empty()) {
    shape.erase(std::remove(shape.begin(), shape.end(), 1), shape.end());
    return true;
  }
  // Torch lets a tensor without dimensions count as one with a single dimension, but for unflatten.
  const size_t countable = kind_ == Kind::unsqueeze   ? dims + 1
                           : kind_ == Kind::unflatten ? dims
                                                      : std::max<size_t>(dims, 1);
  const std::optional<size_t> first = place_of(numbers_[0], countable);
  if (!first) return false;
  if (kind_ == Kind::squeeze) {
    if (dims > 0 && shape[*first] == 1) replace(shape, *first, *first + 1, {});
    return true;
  }
  if (kind_ == Kind::unsqueeze) {
    replace(shape, *first, *first, {1});
    return true;
  }
  if (kind_ == Kind::unflatten) {
    const auto sizes = fitted(c10::IntArrayRef(numbers_).slice(1), shape[*first]);
    if (sizes) replace(shape, *first, *first + 1, *sizes);
    return sizes.has_value();
  }
  const std::optional<size_t> last = place_of(numbers_[1], countable);
  if (!last || *last < *first) return false;
  const size_t end = std::min(*last + 1, dims);
  const std::optional<int64_t> joined = product_of(c10::IntArrayRef(shape).slice(*first, end - *first));
  if (joined) replace(shape, *first, end, {*joined});
  return joined.has_value();
}

void Reshaping::apply(at::DimVector& shape) const {
  at::DimVector changed = shape;
  TORCH_CHECK(try_apply(changed), "fastmlp: the model ends with ", names[int(kind_)], '(', c10::Join(", ", numbers_),
              "), which an output of shape ", c10::IntArrayRef(shape), " does not take");
  shape = changed;
}

}  // namespace fastmlp
