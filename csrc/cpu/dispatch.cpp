// Chooses the instruction set at run time, by what CPUID says. Called by whoever runs kernels, and by bindings.cpp. A
// new instruction set needs a file in isa/, and its declaration and its line in tables() below. Runs no vector code.
#include "dispatch.h"

#include <algorithm>
#include <atomic>
#include <deque>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "caches.h"

namespace fastmlp::cpu {

namespace portable {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
extern const KernelTable table;
}
#endif

thread_local const char* last_isa = "";

unsigned decode_features(const CpuidWords& words) {
  const auto bit = [](uint64_t word, int i) { return (word >> i & 1) != 0; };
  const auto saves = [&](uint64_t state) { return (words.xcr0 & state) == state; };
  const bool osxsave = bit(words.leaf1_ecx, 27);
  const bool ymm = osxsave && saves(0x06);  // XMM, YMM
  const bool zmm = osxsave && saves(0xe6);  // and opmask, upper halves of ZMM0-15, ZMM16-31
  unsigned features = 0;
  const bool fma = bit(words.leaf1_ecx, 12);
  const bool f16c = bit(words.leaf1_ecx, 29);
  const bool avx2 = bit(words.leaf7_ebx, 5);
  if (ymm && fma && f16c && avx2) features |= feature_avx2;
  const bool avx512 = bit(words.leaf7_ebx, 16) && bit(words.leaf7_ebx, 17) &&  // F, DQ
                      bit(words.leaf7_ebx, 30) && bit(words.leaf7_ebx, 31);    // BW, VL
  if (zmm && avx512) features |= feature_avx512;
  if (zmm && bit(words.leaf7_1_eax, 5)) features |= feature_avx512_bf16;
  return features;
}

namespace {

unsigned host_features() {
#if defined(__x86_64__)
  CpuidWords words;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx)) words.leaf1_ecx = ecx;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) words.leaf7_ebx = ebx;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) words.leaf7_1_eax = eax;
  if (words.leaf1_ecx >> 27 & 1) {
    uint32_t low = 0, high = 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    words.xcr0 = uint64_t(high) << 32 | low;
  }
  return decode_features(words);
#else
  return 0;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx;
#else
  return false;
#endif
}

// The last one that is supported; but on Intel's processors not the one with pairs of bfloat16, because on Sapphire
// Rapids that instruction does half as many multiply-adds in a second as that of float32, into which avx512 converts.
const KernelTable* best() {
  static const bool slow_pairs = is_intel();
  const KernelTable* found = nullptr;
  for (const KernelTable* table : tables()) {
    if (supported(*table) && !(slow_pairs && (table->needs & feature_avx512_bf16))) found = table;
  }
  return found;
}

// A table of an ISA's file with the blocks of A that suit a processor.
struct FittedTable {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<BFloat16> bfloat16;
  Kernels<Float16> float16;
  KernelTable table;

  FittedTable(const KernelTable& base, int64_t l2)
      : float32(fit_rows(*base.float32, l2)),
        float64(fit_rows(*base.float64, l2)),
        bfloat16(fit_rows(*base.bfloat16, l2)),
        float16(fit_rows(*base.float16, l2)),
        table(base) {
    table.float32 = &float32;
    table.float64 = &float64;
    table.bfloat16 = &bfloat16;
    table.float16 = &float16;
  }
  FittedTable(const FittedTable&) = delete;
};

std::atomic<const KernelTable*>& active_slot() {
  static std::atomic<const KernelTable*> slot{best()};
  return slot;
}

}  // namespace

template <class S> Kernels<S> fit_rows(Kernels<S> kernels, int64_t l2) {
  if (l2 <= 0) return kernels;
  const int64_t row_bytes = kernels.units(kernels.kc) * int64_t(sizeof(Compute<S>));
  const int64_t rows = std::clamp(l2, smallest_l2, largest_l2) * 3 / 8 / row_bytes;
  kernels.mc = std::max<int64_t>(1, rows / kernels.mr) * kernels.mr;
  return kernels;
}

template Kernels<float> fit_rows(Kernels<float>, int64_t);
template Kernels<double> fit_rows(Kernels<double>, int64_t);
template Kernels<BFloat16> fit_rows(Kernels<BFloat16>, int64_t);
template Kernels<Float16> fit_rows(Kernels<Float16>, int64_t);

const std::vector<const KernelTable*>& tables() {
  static const std::vector<const KernelTable*> built = {
      &portable::table,
#if defined(__x86_64__)
      &avx2::table,
      &avx512::table,
      &avx512_bf16::table,
#endif
  };
  static std::deque<FittedTable> fitted;
  static const std::vector<const KernelTable*> all = [] {
    std::vector<const KernelTable*> found;
    for (const KernelTable* table : built) found.push_back(&fitted.emplace_back(*table, l2_bytes()).table);
    return found;
  }();
  return all;
}

bool supported(const KernelTable& table) {
  static const unsigned features = host_features();
  return (table.needs & ~features) == 0;
}

const KernelTable& active() { return *active_slot().load(std::memory_order_relaxed); }

void set_active(const std::string& name) {
  std::string known;
  for (const KernelTable* table : tables()) {
    known += (known.empty() ? "" : ", ") + std::string(table->name);
    if (name != table->name) continue;
    if (!supported(*table)) {
      throw std::invalid_argument("fastmlp: isa '" + name + "' needs " + table->description +
                                  ", which this processor or its operating system does not offer");
    }
    active_slot().store(table, std::memory_order_relaxed);
    return;
  }
  throw std::invalid_argument("fastmlp: isa must be one of " + known + ", got '" + name + "'");
}

}  // namespace fastmlp::cpu
