// csrc/cuda as the host compiler sees it, the strategy and the kernels of float32 and float64; those of the 16-bit
// dtypes are in kernels_16_bits.cpp, which compiles beside this file.
#include "cuda/narrow.cu"
#include "cuda/network.cu"
#include "cuda/dtypes/float32.cu"
#include "cuda/dtypes/float64.cu"

namespace fastmlp::emulated {

void set_order(const std::string& name) { emulator::set_order(name); }
void refuse_launch(int number) { emulator::launches_before_failure = number; }

}  // namespace fastmlp::emulated
