// csrc/cuda as the host compiler sees it, the strategy and the kernels of float32 and float64; those of the 16-bit
// dtypes are in kernels_16_bits.cpp, which compiles beside this file.

// Libraries of translated kernels share the emulator's variables, and dladdr() finds kernels by name (translated.h).
#pragma GCC visibility push(default)

#include "cuda/narrow.cu"
#include "cuda/network.cu"
#include "cuda/dtypes/float32.cu"
#include "cuda/dtypes/float64.cu"

#pragma GCC visibility pop

#include "emulated.h"

namespace fastmlp::emulated {

void set_order(const std::string& name) { emulator::set_order(name); }
void set_shared_limit(int architecture) { emulator::shared_limit = size_t(architecture < 80 ? 64 : 99) << 10; }
void refuse_launch(int number) { emulator::launches_before_failure = number; }

void set_route(int architecture) { emulator::set_route(architecture); }

std::vector<std::string> take_executed() {
  std::vector<std::string> names(emulator::executed.begin(), emulator::executed.end());
  emulator::executed.clear();
  return names;
}

void set_profile(bool on) { emulator::profile.on = on; }

std::vector<ProfileRow> take_profile() {
  std::vector<ProfileRow> rows;
  for (const auto& row : emulator::profile.take())
    rows.emplace_back(row.kernel, row.line, row.shared, row.bytes, row.accesses, row.actual, row.ideal);
  return rows;
}

}  // namespace fastmlp::emulated
