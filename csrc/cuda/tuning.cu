// Times every candidate for a product by events of the device. The device is kept busy until the host has queued all
// that is timed, so that what the host needs for a call does not count. Called by register.cpp; knows no tensors.
#include "tuning.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "../contract/activation_info.h"
#include "../contract/storage.h"
#include "device.h"

namespace fastmlp::cuda {
namespace {

constexpr int rounds = 5;
// Between two events there are as many calls as take this long together, and at most most_calls.
constexpr float round_milliseconds = 0.2f;
constexpr int most_calls = 32;
// How long the device is kept busy at first, and at most: about half a millisecond, and some 80 milliseconds.
constexpr int64_t first_clocks = int64_t(1) << 20, most_clocks = int64_t(1) << 27;

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
  // Whether the device has come to it.
  bool is_reached() const {
    const cudaError_t error = cudaEventQuery(event_);
    if (error == cudaErrorNotReady) {
      // This is an answer, but CUDA records it as an error.
      cudaGetLastError();
      return false;
    }
    check(error, "cudaEventQuery");
    return true;
  }
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

class Stopwatch {
 public:
  Stopwatch(void* stream, const Occupy& occupy) : stream_(stream), occupy_(occupy) {}

  // Returns the device's milliseconds for one call: the least of some rounds, after calls that are not counted. None if
  // the host is too slow to keep ahead of the device.
  template <class F> std::optional<float> least_time(const F& function) {
    // The first call loads code, and the library chooses an algorithm.
    function();
    const std::optional<float> once = round(function, 1);
    if (!once) return std::nullopt;
    const int calls = int(std::clamp(round_milliseconds / *once, 1.f, float(most_calls)));
    float least = std::numeric_limits<float>::infinity();
    for (int i = 0; i < rounds; i++) {
      const std::optional<float> time = round(function, calls);
      if (!time) return std::nullopt;
      least = std::min(least, *time);
    }
    return least;
  }

 private:
  // If the device came to the first event before the host had queued the last one, then the host was timed; the round
  // is repeated behind twice as much work.
  template <class F> std::optional<float> round(const F& function, int calls) {
    for (; clocks_ <= most_clocks; clocks_ *= 2) {
      occupy_(clocks_);
      begin_.record(stream_);
      for (int i = 0; i < calls; i++) function();
      end_.record(stream_);
      const bool kept_ahead = !begin_.is_reached();
      const float milliseconds = end_.since(begin_);
      if (kept_ahead) return milliseconds / float(calls);
    }
    return std::nullopt;
  }

  void* stream_;
  const Occupy& occupy_;
  int64_t clocks_ = first_clocks;
  Event begin_, end_;
};

// A product like the key's, with the operands' usual layouts, and relu where an activation may follow.
template <class S> Product<S> product_of(const ProductKey& key, const Random& random) {
  // Rows that are one element longer are not aligned, and their elements are read one by one.
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
    p.saved = {static_cast<const S*>(random(key.m * key.n)), key.n, 1};
  }
  return p;
}

template <class S>
std::optional<TileSize> fastest_of(Context context, const ProductKey& key, const Random& random, const Occupy& occupy) {
  constexpr int64_t elements_of_a_sum = (sizeof(Compute<S>) + sizeof(S) - 1) / sizeof(S);
  Product<S> p = product_of<S>(key, random);
  Stopwatch stopwatch(context.stream, occupy);
  TileSize best = small_tile;
  float least = std::numeric_limits<float>::infinity();
  for (const TileSize tile : {large_tile, medium_tile, small_tile, library_call}) {
    context.tile = tile;
    const Plan plan = Kernels<S>::plan(context, key.epilogue, p);
    // If there is no kernel for a candidate, plan() returns another one.
    if (plan.tile != tile) continue;
    p.partials =
        plan.parts > 1 ? static_cast<Compute<S>*>(random(plan.parts * p.m * p.n * elements_of_a_sum)) : nullptr;
    p.column_sums = key.epilogue == Epilogue::dgrad
                        ? static_cast<Compute<S>*>(random(plan.row_tiles * p.n * elements_of_a_sum))
                        : nullptr;
    const std::optional<float> time = stopwatch.least_time([&] {
      Kernels<S>::multiply(context, plan, key.epilogue, p);
      if (p.column_sums) Kernels<S>::sum_partials(context, p.column_sums, plan.row_tiles, p.n, p.output);
    });
    if (!time) return std::nullopt;
    if (*time < least) {
      least = *time;
      best = tile;
    }
  }
  return best;
}

}  // namespace

std::optional<TileSize> fastest(const Context& context, const ProductKey& key, const Random& random,
                                const Occupy& occupy) {
  return with_storage(key.dtype,
                      [&](auto storage) { return fastest_of<decltype(storage)>(context, key, random, occupy); });
}

}  // namespace fastmlp::cuda
