// Prints where the time of square products goes: packing A, packing B, the micro-kernel with what it stores, and the
// rest, beside the time in which a copy would move what is packed. A developer's tool, built and run by
// `make product-account`; knows neither Python nor torch. It puts functions that read the clock into a copy of the
// kernels' table, so that the products themselves are those of the library.
//
//   account_products [ISA]     the best ISA of the processor, if not given
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../csrc/cpu/dispatch.h"
#include "../csrc/cpu/gemm.h"

namespace {

using namespace fastmlp;
using namespace fastmlp::cpu;
using Clock = std::chrono::steady_clock;
using Pack = void (*)(const float*, int64_t, int64_t, int64_t, int64_t, float*);

constexpr int most_kernels = 64;

Kernels<float> own, timed;
double packing_a, packing_b, multiplying;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

template <Pack Kernels<float>::* which, double& total>
void timed_pack(const float* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, float* panel) {
  const auto start = Clock::now();
  (own.*which)(source, stride, k_stride, count, k, panel);
  total += seconds_since(start);
}

template <int i> void timed_kernel(const Tile<float>& tile) {
  const auto start = Clock::now();
  own.microkernels[i](tile);
  multiplying += seconds_since(start);
}

template <int... i> const Microkernel<float>* timed_kernels(std::integer_sequence<int, i...>) {
  static const Microkernel<float> kernels[] = {&timed_kernel<i>...};
  return kernels;
}

double median(std::vector<double>& values) {
  std::nth_element(values.begin(), values.begin() + int64_t(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// What the clock itself takes, which each timed call adds to what it measures.
double clock_cost() {
  constexpr int calls = 100000;
  const auto start = Clock::now();
  for (int i = 0; i < calls; i++) seconds_since(start);
  return seconds_since(start) / calls;
}

// Bytes that a copy of a matrix much larger than any cache reads in a second.
double copy_rate() {
  const std::vector<float> from(size_t(1) << 25, 1.0f);
  std::vector<float> to(from.size());
  std::vector<double> taken;
  for (int round = 0; round < 7; round++) {
    const auto start = Clock::now();
    std::memcpy(to.data(), from.data(), from.size() * sizeof(float));
    taken.push_back(seconds_since(start));
  }
  return double(from.size() * sizeof(float)) / median(taken);
}

void account(int64_t n, const char* layout, double copied_bytes) {
  std::vector<float> a(size_t(n * n) + 64), b(a.size()), c(a.size());
  std::mt19937 generator(1);
  for (auto* values : {&a, &b}) {
    for (float& value : *values) value = float(generator()) / 4294967296.0f - 0.5f;
  }
  Product<float> product;
  product.m = product.n = product.k = n;
  product.a.data = a.data();
  product.b.data = b.data();
  std::tie(product.a.stride, product.a.k_stride) =
      layout[0] == 'N' ? std::pair(n, int64_t(1)) : std::pair(int64_t(1), n);
  std::tie(product.b.stride, product.b.k_stride) =
      layout[1] == 'T' ? std::pair(n, int64_t(1)) : std::pair(int64_t(1), n);
  product.output = c.data();
  product.leading_dimension = n;

  KernelTable plain_table = active(), timed_table = active();
  plain_table.float32 = &own;
  timed_table.float32 = &timed;
  std::array<std::vector<double>, 5> taken;
  const int rounds = int(std::clamp<int64_t>((int64_t(1) << 33) / (n * n * n), 7, 201));
  for (int round = -1; round < rounds; round++) {
    auto start = Clock::now();
    multiply(plain_table, product, 1);
    const double plain = seconds_since(start);
    packing_a = packing_b = multiplying = 0;
    start = Clock::now();
    multiply(timed_table, product, 1);
    const double whole = seconds_since(start);
    if (round < 0) continue;
    const double rest = whole - packing_a - packing_b - multiplying;
    const double found[] = {plain, packing_a, packing_b, multiplying, rest};
    for (size_t i = 0; i < taken.size(); i++) taken[i].push_back(found[i]);
  }
  const double flops = 2e-9 * double(n) * double(n) * double(n);
  std::printf("%6d %s %10.0f", int(n), layout, median(taken[0]) * 1e6);
  for (size_t i = 1; i < taken.size(); i++) std::printf(" %10.0f", median(taken[i]) * 1e6);
  std::printf(" %10.0f %8.1f %8.1f\n", double(n * n) * sizeof(float) / copied_bytes * 1e6, flops / median(taken[0]),
              flops / median(taken[3]));
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) set_active(arguments[1]);
  own = timed = *active().float32;
  timed.pack_a = &timed_pack<&Kernels<float>::pack_a, packing_a>;
  timed.pack_b = &timed_pack<&Kernels<float>::pack_b, packing_b>;
  timed.microkernels = timed_kernels(std::make_integer_sequence<int, most_kernels>{});
  if (own.mr * (own.nr / own.lanes) > most_kernels) {
    std::fprintf(stderr, "account_products times %d micro-kernels; this table has more\n", most_kernels);
    return 1;
  }
  const double copied_bytes = copy_rate();
  std::printf("%s, float32, one thread, microseconds; a copy moves %.1f GB/s, the clock takes %.3f us a call\n",
              active().name, copied_bytes * 1e-9, clock_cost() * 1e6);
  std::printf("%9s %10s %10s %10s %10s %10s %10s %8s %8s\n", "product", "whole", "pack A", "pack B", "kernel", "rest",
              "copy of A", "GFLOP/s", "kernel's");
  for (const int64_t n : {256, 512, 1024, 2048}) {
    for (const char* layout : {"NT", "NN", "TN"}) account(n, layout, copied_bytes);
  }
}
