// What bindings.cpp asks of the emulator, which only kernels.cpp knows.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

namespace fastmlp::emulated {

void set_order(const std::string& name);
void refuse_launch(int number);
void set_shared_limit(int architecture);

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
