// Prints the rate of square products under other cache blocks than those of tiles.h: the measurements that
// those were chosen by. A developer's tool, built and run by `make tiles`; knows neither Python nor torch.
//
//   tune_tiles [ISA [DTYPE]]     the best ISA of the processor and float32, if not given
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cpu/dispatch.h"
#include "../csrc/cpu/gemm.h"

namespace {

using namespace fastmlp;
using namespace fastmlp::cpu;

struct Blocks {
  int64_t kc, mc, nc;
};

template <class S> constexpr bool is_half = sizeof(S) == 2;

// Small numbers of both signs, whatever the dtype makes of the bits.
template <class S> std::vector<S> random_matrix(int64_t count) {
  std::vector<S> values(size_t(count) + 64);
  std::mt19937 generator(1);
  for (S& value : values) {
    if constexpr (is_half<S>) {
      value.bits = uint16_t(0x3800u | (generator() & 0x80ffu));
    } else {
      value = S(generator()) / S(4294967296.0) - S(0.5);
    }
  }
  return values;
}

template <class S> Operand<S> operand(const std::vector<S>& values, int64_t stride, int64_t k_stride) {
  Operand<S> x;
  x.data = values.data();
  x.stride = stride;
  x.k_stride = k_stride;
  return x;
}

template <class S> void use(KernelTable& table, const Kernels<S>& kernels);
template <> void use(KernelTable& table, const Kernels<float>& kernels) { table.float32 = &kernels; }
template <> void use(KernelTable& table, const Kernels<double>& kernels) { table.float64 = &kernels; }
template <> void use(KernelTable& table, const Kernels<BFloat16>& kernels) { table.bfloat16 = &kernels; }
template <> void use(KernelTable& table, const Kernels<Float16>& kernels) { table.float16 = &kernels; }

// GFLOP/s of each choice of blocks, which take turns.
template <class S>
std::vector<double> rates(const KernelTable& base, const std::vector<Blocks>& choices, int64_t n, const char* layout) {
  const std::vector<S> a = random_matrix<S>(n * n), b = random_matrix<S>(n * n);
  std::vector<S> c = random_matrix<S>(n * n);
  Product<S> product;
  product.m = product.n = product.k = n;
  product.a = layout[0] == 'N' ? operand(a, n, 1) : operand(a, 1, n);
  product.b = layout[1] == 'N' ? operand(b, 1, n) : operand(b, n, 1);
  product.output = c.data();
  product.leading_dimension = n;

  std::vector<std::vector<double>> seconds(choices.size());
  const int rounds = int(std::clamp<int64_t>((int64_t(1) << 34) / (n * n * n), 5, 101));
  for (int round = -1; round < rounds; round++) {
    for (size_t i = 0; i < choices.size(); i++) {
      Kernels<S> kernels = kernels_of<S>(base);
      kernels.kc = choices[i].kc;
      kernels.mc = choices[i].mc;
      kernels.nc = choices[i].nc;
      KernelTable table = base;
      use<S>(table, kernels);
      const auto start = std::chrono::steady_clock::now();
      multiply(table, product, 1);
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      if (round >= 0) seconds[i].push_back(taken.count());
    }
  }
  std::vector<double> found;
  for (std::vector<double>& times : seconds) {
    std::nth_element(times.begin(), times.begin() + rounds / 2, times.end());
    found.push_back(2e-9 * double(n) * double(n) * double(n) / times[size_t(rounds) / 2]);
  }
  return found;
}

template <class S> void print_table(const KernelTable& table, const char* dtype) {
  const Kernels<S>& own = kernels_of<S>(table);
  std::vector<Blocks> choices{{own.kc, own.mc, own.nc}};
  for (const int64_t part : {4, 2}) choices.push_back({own.kc / part, own.mc, own.nc});
  choices.push_back({own.kc * 2, own.mc, own.nc});
  for (const int64_t times : {2, 4}) choices.push_back({own.kc, own.mc * times, own.nc});
  choices.push_back({own.kc / 4, own.mc * 4, own.nc});
  choices.push_back({own.kc, own.mc, own.nc / 2});
  choices.push_back({own.kc, own.mc, own.nc * 2});

  std::printf("%s %s, register tile %d x %d: GFLOP/s of n x n x n, one thread; the first column is in use\n",
              table.name, dtype, int(own.mr), int(own.nr));
  std::printf("%9s", "KC,MC,NC");
  for (const Blocks& b : choices) {
    const std::string name = std::to_string(b.kc) + "," + std::to_string(b.mc) + "," + std::to_string(b.nc);
    std::printf(" %14s", name.c_str());
  }
  std::printf("\n");
  for (const int64_t n : {256, 512, 1024, 2048}) {
    for (const char* layout : {"NT", "NN", "TN"}) {
      std::printf("%6d %s", int(n), layout);
      for (const double rate : rates<S>(table, choices, n, layout)) std::printf(" %14.1f", rate);
      std::printf("\n");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) set_active(arguments[1]);
  const std::string dtype = count > 2 ? arguments[2] : "float32";
  if (dtype == "float32") {
    print_table<float>(active(), "float32");
  } else if (dtype == "float64") {
    print_table<double>(active(), "float64");
  } else if (dtype == "bfloat16") {
    print_table<BFloat16>(active(), "bfloat16");
  } else if (dtype == "float16") {
    print_table<Float16>(active(), "float16");
  } else {
    throw std::invalid_argument("DTYPE must be float32, float64, bfloat16 or float16, got '" + dtype + "'");
  }
}
