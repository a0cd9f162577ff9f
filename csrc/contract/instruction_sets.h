// The instruction sets of which a device offers a choice, as data for Python. Filled by the register file of the CPU,
// shown by bindings.cpp. Holds no kernels: those are the device's own.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace fastmlp {

struct InstructionSet {
  using Sizes = std::vector<std::pair<const char*, int64_t>>;

  const char* name;
  const char* description;
  bool supported;  // by this processor and its operating system
  // For each dtype the sizes of the kernels' blocks: {"float32", {{"MR", 8}, ...}}.
  std::vector<std::pair<const char*, Sizes>> sizes;
};

struct InstructionSets {
  std::vector<InstructionSet> (*all)();
  const char* (*active)();
  // Throws std::invalid_argument for a name that is unknown, or not supported here.
  void (*set_active)(const std::string& name);
  // The set that the calling thread ran last; empty if none.
  const char* (*last)();
  // The names of those that a processor would support which answers these words: ECX of CPUID's leaf 1, EBX of leaf 7,
  // EAX of leaf 7.1, and XCR0. For tests.
  std::vector<std::string> (*supported_by)(const std::array<uint64_t, 4>& words);
};

}  // namespace fastmlp
