// Kernels that tests/emulator/ptx translated from nvcc's PTX, and the memory profile of their runs. Part of emulator.h.
// Libraries of such kernels are loaded beside `_C_emulated`; they register here when they are, and launch.h runs them
// in place of the host compiler's kernels of the same name once set_route() names their architecture. All libraries
// share one emulator: its symbols are visible everywhere, so that the loader unites its variables.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <tuple>

namespace emulator {

// Takes the addresses of the parameters, as cudaLaunchKernel does.
using TranslatedKernel = void (*)(const void* const* parameters);

// By architecture and mangled name.
inline std::map<std::pair<int, std::string>, TranslatedKernel> translated;
// The architecture whose kernels run, or 0: the host compiler's.
inline int route = 0;
// Translated kernels that were launched.
inline std::set<std::string> executed;

inline void set_route(int architecture) { route = architecture; }

struct RegisterTranslated {
  RegisterTranslated(int architecture, const char* name, TranslatedKernel kernel) {
    translated[{architecture, name}] = kernel;
  }
};

// By the name that the loader knows the host compiler's kernel by.
inline TranslatedKernel translation_of(const void* kernel, std::string& name) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || !info.dli_sname || info.dli_saddr != kernel)
    throw Error("the emulator finds no name of a kernel");
  name = info.dli_sname;
  // nvcc has one kernel for each architecture where the host compiler has one for each staging.
  const std::string by_registers = "StagingE1";
  if (const size_t at = name.find(by_registers); at != std::string::npos) name[at + by_registers.size() - 1] = '0';
  const auto found = translated.find({route, name});
  if (found == translated.end())
    throw Error("no translated kernel for compute_" + std::to_string(route) + " is loaded of " + name);
  return found->second;
}

// What warps access, instruction by instruction. The n-th execution of an instruction by the lanes of a warp is taken
// for one access: true where they do not diverge, as with whole tiles.
//   shared: wavefronts. The lanes of one are 32, 16 or 8, by 4, 8 or 16 bytes; it takes as many as the most words in a
//   bank, and would take one for each 32 words.
//   global: sectors of 32 bytes, which would be as many as hold the bytes that differ.
class Profile {
 public:
  struct Row {
    std::string kernel;
    int line = 0;  // of the PTX
    bool shared = false;
    int bytes = 0;
    int64_t accesses = 0, actual = 0, ideal = 0;
  };

  bool on = false;

  void begin(const std::string& kernel) { kernel_ = kernel; }

  void note(int line, uint64_t address, size_t bytes, bool shared) {
    const Unseen unseen;
    Site& at = sites_[{line, shared}];
    at.bytes = int(bytes);
    at.addresses.resize(block->fibers.size());
    at.addresses[size_t(current - block->fibers.data())].push_back(address);
  }

  void end_block() {
    for (auto& [place, site] : sites_) {
      Row& row = rows_[{kernel_, place}];
      row.kernel = kernel_;
      std::tie(row.line, row.shared) = place;
      row.bytes = site.bytes;
      for (size_t warp = 0; warp < site.addresses.size(); warp += warp_size) count(row, site, warp);
    }
    sites_.clear();
  }

  std::vector<Row> take() {
    std::vector<Row> rows;
    for (auto& [key, row] : rows_) rows.push_back(row);
    rows_.clear();
    return rows;
  }

 private:
  // Of an instruction: its line, and whether it is its access to shared memory; copies have one of either kind.
  using Place = std::pair<int, bool>;
  struct Site {
    int bytes = 0;
    std::vector<std::vector<uint64_t>> addresses;  // of each thread, in its order
  };

  static void count(Row& row, const Site& site, size_t warp) {
    const size_t lanes = row.shared ? 128 / size_t(std::max(4, site.bytes)) : warp_size;
    size_t executions = 0;
    for (size_t lane = 0; lane < warp_size; lane++)
      executions = std::max(executions, site.addresses[warp + lane].size());
    for (size_t n = 0; n < executions; n++) {
      row.accesses++;
      for (size_t first = 0; first < warp_size; first += lanes) {
        std::set<uint64_t> units, sectors;  // words or bytes, and sectors
        for (size_t lane = warp + first; lane < warp + first + lanes; lane++) {
          if (n >= site.addresses[lane].size()) continue;
          for (uint64_t byte = 0; byte < uint64_t(site.bytes); byte++) {
            const uint64_t address = site.addresses[lane][n] + byte;
            units.insert(row.shared ? address / 4 : address);
            sectors.insert(address / 32);
          }
        }
        if (units.empty()) continue;
        if (row.shared) {
          std::array<int64_t, 32> words{};
          for (uint64_t word : units) words[word % 32]++;
          row.actual += *std::max_element(words.begin(), words.end());
          row.ideal += int64_t(units.size() + 31) / 32;
        } else {
          row.actual += int64_t(sectors.size());
          row.ideal += int64_t(units.size() + 31) / 32;
        }
      }
    }
  }

  std::string kernel_;
  std::map<Place, Site> sites_;
  std::map<std::pair<std::string, Place>, Row> rows_;
};

inline Profile profile;

inline void note_access(int line, uint64_t address, size_t bytes, bool shared) {
  if (profile.on) profile.note(line, address, bytes, shared);
}

}  // namespace emulator
