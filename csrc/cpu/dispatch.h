// Which instruction sets this build and this processor offer, and which one runs. network.cpp, step.cpp and the frozen
// networks ask for the active table, bindings.cpp serves Python's get_isa and set_isa. Baseline code, which is compiled
// for the oldest processor of the architecture.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace fastmlp::cpu {

// What CPUID and XGETBV say. Deciding is apart from asking them, so that a test can make a processor up.
struct CpuidWords {
  uint32_t leaf1_ecx = 0;
  uint32_t leaf7_ebx = 0;
  uint32_t leaf7_1_eax = 0;
  uint64_t xcr0 = 0;  // the register state that the operating system saves; 0 without OSXSAVE
};

// A set of Feature bits: what both the processor and the operating system support.
unsigned decode_features(const CpuidWords& words);

// What an L2 cache has at least and at most, whatever the system says: several cores may share one that is larger.
constexpr int64_t smallest_l2 = 256 << 10, largest_l2 = 2048 << 10;

// The kernels with as many rows in a block of A as fill three eighths of an L2 cache of so many bytes, which a panel of
// B and what is prefetched share with it; or as they are, where that is 0.
template <class S> Kernels<S> fit_rows(Kernels<S> kernels, int64_t l2);

// Every table of this build, the most portable first, fitted to this processor.
const std::vector<const KernelTable*>& tables();
bool supported(const KernelTable& table);

// The table in use: the fastest supported one unless set_active chose another.
const KernelTable& active();
// Throws std::invalid_argument for a name that is unknown, or not supported here.
void set_active(const std::string& name);

}  // namespace fastmlp::cpu
