// Stands for the CUDA device in a build without its kernels: says how to build them. setup.py compiles this file or the
// others of the folder, never both.
#include "../tensors/devices.h"

namespace fastmlp::cuda {

static const RegisterAbsentDevice registered(
    c10::kCUDA,
    "this build has no CUDA kernels; in the source tree, FASTMLP_CUDA=1 pip install --no-build-isolation "
    "--force-reinstall --no-deps . builds them");

}  // namespace fastmlp::cuda
