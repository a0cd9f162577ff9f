// csrc/cuda as the host compiler sees it, the strategy and the kernels of float32 and float64; those of the 16-bit
// dtypes are in kernels_16_bits.cpp, which compiles beside this file.

// Libraries of translated kernels share the emulator's variables, and dladdr() finds kernels by name (translated.h).
#pragma GCC visibility push(default)

#include "cuda/narrow.cu"
#include "cuda/network.cu"
#include "cuda/tuning.cu"
#include "cuda/dtypes/float32.cu"
#include "cuda/dtypes/float64.cu"

#pragma GCC visibility pop

#include "emulated.h"

namespace fastmlp::emulated {

void set_order(const std::string& name) { emulator::set_order(name); }
void set_shared_limit(int64_t bytes) { emulator::shared_limit = size_t(bytes); }
void set_code(bool exists) { cuda::has_code = exists; }
void refuse_launch(int number) { emulator::launches_before_failure = number; }

Tuned tune(const cuda::Context& context, const cuda::ProductKey& key, const Times& times) {
  constexpr double clocks_of_microsecond = 1000;
  emulator::Timeline& timeline = emulator::timeline;
  timeline = {};
  timeline.launch = {times.launch_host, times.launch_device};
  std::vector<std::vector<double>> memory;
  const auto zeros = [&](int64_t elements) -> void* {
    return memory.emplace_back(std::vector<double>(size_t(elements))).data();
  };
  const auto occupy = [&](int64_t clocks) {
    timeline.queue("busy", {times.launch_host, times.busy * double(clocks) / clocks_of_microsecond});
  };
  cuda::Context timed = context;
  timed.library = [&](const cuda::LibraryProduct&) {
    timeline.queue("library", {times.library_host, times.library_device});
  };
  Tuned tuned;
  tuned.tile = cuda::fastest(timed, key, zeros, occupy);
  tuned.calls = timeline.calls;
  timeline = {};
  return tuned;
}

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
