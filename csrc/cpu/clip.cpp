// Shares the elements of gradients among threads, and joins what their parts give in order. Called through clip.h by
// register.cpp. Must stay baseline code: arithmetic of vectors is behind the table of the instruction set.
#include "clip.h"

#include <cmath>

#include "dispatch.h"
#include "parallel.h"

namespace fastmlp::cpu {
namespace {

using Parts = std::vector<Part<Gradient>>;

// Calls run(kernels, elements, n, i) for each part i, where `elements` are those of the part.
template <class Run> void visit(const Parts& parts, int threads, const Run& run) {
  const KernelTable& table = active();
  table.mark();
  int64_t elements = 0;
  for (const Part<Gradient>& part : parts) elements += part.range.size();
  run_tasks(int64_t(parts.size()), threads_for_elements(elements, threads), [&](int64_t i, int) {
    const auto& [gradient, range] = parts[size_t(i)];
    with_storage(gradient->dtype, [&](auto storage) {
      using S = decltype(storage);
      run(*kernels_of<S>(table).clip, static_cast<S*>(gradient->data) + range.begin, range.size(), size_t(i));
    });
  });
}

}  // namespace

double gradient_norm(const std::vector<Gradient>& gradients, NormOrder order, int threads) {
  const Parts parts = parts_of(gradients);
  std::vector<double> found(parts.size());
  visit(parts, threads, [&](const auto& kernels, const auto* elements, int64_t n, size_t i) {
    found[i] = order == NormOrder::two ? kernels.squares(n, elements) : kernels.largest(n, elements);
  });
  double all = 0;
  for (const double one : found) {
    if (order == NormOrder::two) {
      all += one;
    } else if (one > all || std::isnan(one)) {
      all = one;
    }
  }
  return order == NormOrder::two ? std::sqrt(all) : all;
}

void scale_gradients(const std::vector<Gradient>& gradients, double factor, int threads) {
  visit(parts_of(gradients), threads,
        [&](const auto& kernels, auto* elements, int64_t n, size_t) { kernels.scale(n, elements, factor); });
}

void clamp_gradients(const std::vector<Gradient>& gradients, double limit, int threads) {
  visit(parts_of(gradients), threads,
        [&](const auto& kernels, auto* elements, int64_t n, size_t) { kernels.clamp(n, elements, limit); });
}

}  // namespace fastmlp::cpu
