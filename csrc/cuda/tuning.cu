// Times every candidate for a product by events of the device. Torch-free; called by register.cpp.
#include "tuning.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "../activation_info.h"
#include "../storage.h"

namespace fastmlp::cuda {
namespace {

constexpr int rounds = 5;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastmlp: ") + what + " failed: " + cudaGetErrorString(error));
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(void* stream) { check(cudaEventRecord(event_, static_cast<cudaStream_t>(stream)), "cudaEventRecord"); }
  // Waits for both.
  float since(const Event& begin) const {
    float milliseconds = 0;
    check(cudaEventSynchronize(event_), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "cudaEventElapsedTime");
    return milliseconds;
  }

 private:
  cudaEvent_t event_;
};

// Least milliseconds of some rounds, after one that is not counted.
template <class F> float least_time(void* stream, const F& function) {
  float least = std::numeric_limits<float>::infinity();
  Event begin, end;
  for (int round = 0; round <= rounds; round++) {
    begin.record(stream);
    function();
    end.record(stream);
    const float time = end.since(begin);
    if (round > 0) least = std::min(least, time);
  }
  return least;
}

// A product like the key's, with the operands' usual layouts, and relu where an activation may follow.
template <class S> Product<S> product_of(const ProductKey& key, const std::function<void*(int64_t elements)>& random) {
  // One element further, rows are not aligned, and are read one by one.
  const int64_t gap = key.vectors ? 0 : 1;
  const auto matrix = [&](int64_t rows, int64_t columns, bool along_columns) {
    Operand<S> x{static_cast<const S*>(random(rows * (columns + gap) + columns * gap + gap)) + gap, columns + gap, 1};
    if (!along_columns) std::swap(x.stride, x.k_stride);
    return x;
  };
  Product<S> p;
  p.m = key.m;
  p.n = key.n;
  p.k = key.k;
  const bool wgrad = key.epilogue == Epilogue::wgrad;
  p.a = wgrad ? matrix(key.k, key.m, false) : matrix(key.m, key.k, true);
  p.b = key.epilogue == Epilogue::forward ? matrix(key.n, key.k, true) : matrix(key.k, key.n, false);
  p.output = static_cast<S*>(random(key.m * key.n));
  if (key.epilogue == Epilogue::forward) {
    p.bias = static_cast<const S*>(random(key.n));
    p.bias_stride = 1;
  }
  if (!wgrad) p.activation.kind = relu_kind;
  if (key.epilogue == Epilogue::dgrad) {
    p.saved = static_cast<const S*>(random(key.m * key.n));
    p.saved_stride = key.n;
    p.saved_column_stride = 1;
  }
  return p;
}

template <class S>
TileSize fastest_of(Context context, const ProductKey& key, const std::function<void*(int64_t elements)>& random) {
  constexpr int64_t elements_of_a_sum = (sizeof(Compute<S>) + sizeof(S) - 1) / sizeof(S);
  Product<S> p = product_of<S>(key, random);
  TileSize best = small_tile;
  float least = std::numeric_limits<float>::infinity();
  for (const TileSize tile : {large_tile, medium_tile, small_tile, library_call}) {
    context.tile = tile;
    const Plan plan = Kernels<S>::plan(context, key.epilogue, p);
    // A candidate that there is no kernel for is planned as another.
    if (plan.tile != tile) continue;
    p.partials =
        plan.parts > 1 ? static_cast<Compute<S>*>(random(plan.parts * p.m * p.n * elements_of_a_sum)) : nullptr;
    p.column_sums = key.epilogue == Epilogue::dgrad
                        ? static_cast<Compute<S>*>(random(plan.row_tiles * p.n * elements_of_a_sum))
                        : nullptr;
    const float time = least_time(context.stream, [&] {
      Kernels<S>::multiply(context, plan, key.epilogue, p);
      if (p.column_sums) Kernels<S>::sum_partials(context, p.column_sums, plan.row_tiles, p.n, p.output);
    });
    if (time < least) {
      least = time;
      best = tile;
    }
  }
  return best;
}

}  // namespace

TileSize fastest(const Context& context, const ProductKey& key, const std::function<void*(int64_t elements)>& random) {
  TileSize best = small_tile;
  with_storage(key.dtype, [&](auto storage) { best = fastest_of<decltype(storage)>(context, key, random); });
  return best;
}

}  // namespace fastmlp::cuda
