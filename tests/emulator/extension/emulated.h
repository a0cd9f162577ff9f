// What bindings.cpp asks of the emulator, which only kernels.cpp knows.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/products.h"

namespace fastmlp::emulated {

void set_order(const std::string& name);
void refuse_launch(int number);
void set_shared_limit(int64_t bytes);
void set_code(bool exists);

// What tuning.h chooses for a product if a launch and the library's product take the host and the device so many
// microseconds, and the calls that it made: "busy" keeps the device busy for `busy` of what was asked for.
struct Times {
  double launch_host = 0, launch_device = 0, library_host = 0, library_device = 0, busy = 1;
};
struct Tuned {
  std::optional<cuda::TileSize> tile;
  std::vector<std::string> calls;
};
Tuned tune(const cuda::Context& context, const cuda::ProductKey& key, const Times& times);

// Kernels that were translated from PTX: which architecture's run, 0 for none, and the names of those that ran since
// the last call.
void set_route(int architecture);
std::vector<std::string> take_executed();

// Kernel, line of the instruction in the PTX, whether it is shared memory, bytes of a lane, accesses of warps, and
// their wavefronts or sectors: actual and ideal.
using ProfileRow = std::tuple<std::string, int, bool, int, int64_t, int64_t, int64_t>;
void set_profile(bool on);
std::vector<ProfileRow> take_profile();

}  // namespace fastmlp::emulated
