// Checks and flattens as flattened.h says. Elements are copied as bytes, whatever they stand for.
#include "flattened.h"

#include <ATen/core/Tensor.h>
#include <c10/util/safe_numerics.h>

#include <cstring>
#include <optional>
#include <string>

namespace fastmlp {
namespace {

// Bytes from one feature of a row to the next; none if they differ.
std::optional<int64_t> step_of_features(const StridedView& x, int64_t element) {
  std::optional<int64_t> step;
  int64_t count = 1;
  for (int d = x.dims; --d > 0;) {
    if (x.sizes[d] == 1) continue;
    if (!step) step = x.steps[d];
    if (x.steps[d] != count * *step) return std::nullopt;
    count *= x.sizes[d];
  }
  return step.value_or(element);
}

template <int64_t element> char* copy_line(const char* from, int64_t step, int64_t count, char* to) {
  for (int64_t i = 0; i < count; i++, from += step, to += element) std::memcpy(to, from, element);
  return to;
}

// Copies the elements from dimension `d` on, in order; where the next ones belong.
char* copy_from(const StridedView& x, int d, const char* from, int64_t element, char* to) {
  if (d + 1 == x.dims) {
    const auto copy = element == 8 ? copy_line<8> : element == 4 ? copy_line<4> : copy_line<2>;
    return copy(from, x.steps[d], x.sizes[d], to);
  }
  for (int64_t i = 0; i < x.sizes[d]; i++) to = copy_from(x, d + 1, from + i * x.steps[d], element, to);
  return to;
}

}  // namespace

void check_flattened(c10::IntArrayRef shape, int64_t features, const char* whose) {
  uint64_t row = 0;
  if (shape.size() >= 2 && !c10::safe_multiplies_u64(shape.slice(1), &row) && row == uint64_t(features)) return;
  uint64_t all = 0;
  const bool divides =
      features > 0 && !c10::safe_multiplies_u64(shape, &all) && all > 0 && all % uint64_t(features) == 0;
  const std::string remedy = divides ? "; give input.reshape(-1, " + std::to_string(features) + ')' : std::string();
  TORCH_CHECK(false, "fastmlp: input has shape ", shape, ", expected [N, ...] with ", features,
              " elements in all dimensions after the first together, which are flattened: the in_features of ", whose,
              remedy);
}

FlatRows::FlatRows(const StridedView& x, int64_t features, int64_t element) {
  view_.data = x.data;
  view_.dims = 2;
  view_.sizes[0] = x.sizes[0];
  view_.sizes[1] = features;
  view_.steps[0] = x.steps[0];
  view_.steps[1] = element;
  const bool empty = x.sizes[0] == 0 || features == 0;
  if (empty) return;
  if (const std::optional<int64_t> step = step_of_features(x, element)) {
    view_.steps[1] = *step;
    return;
  }
  copy_ = std::make_unique_for_overwrite<char[]>(size_t(x.sizes[0] * features * element));
  copy_from(x, 0, x.data, element, copy_.get());
  view_.data = copy_.get();
  view_.steps[0] = features * element;
}

GaplessRows::GaplessRows(const StridedView& x, int64_t element) : data_(x.data) {
  int64_t count = 1;
  bool gapless = reinterpret_cast<uintptr_t>(x.data) % uintptr_t(element) == 0;
  for (int d = x.dims; d-- > 0;) {
    gapless = gapless && (x.sizes[d] == 1 || x.steps[d] == count * element);
    count *= x.sizes[d];
  }
  if (gapless || count == 0) return;
  copy_ = std::make_unique_for_overwrite<char[]>(size_t(count * element));
  copy_from(x, 0, x.data, element, copy_.get());
  data_ = copy_.get();
}

}  // namespace fastmlp
