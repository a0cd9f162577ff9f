"""What nvcc really emits for csrc/cuda, translated to C++ and executed by tests/emulator.

The emulator alone runs the kernels as the host compiler sees them. Here they have gone through nvcc's front end and
optimiser, and the inline PTX of device.h with its operands is executed too: build.py has nvcc make PTX, translate.py
turns it into C++ by the tables of tables.py, semantics.h gives that its meaning, and `_C_emulated` runs the kernels in
place of its own of the same name. checks.py compares the two, profile.py counts bank conflicts and sectors.

    python -m tests.emulator.ptx --arch 75 80 90 --dtype float32 --check bits bounds profile

prints a row of JSON for each kernel and check (kernel, dtype, architecture, check, result) and fails if one of them
failed; the first run compiles. tests/cuda/test_cuda_ptx.py is the part that CI runs.

nvcc is that of CUDA_HOME or comes from PyPI: nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and
nvidia-cuda-cccl, all ==13.0.*, which make the same PTX byte for byte. Besides, g++ and binutils (c++filt).

Limits: those of the emulator (emulator.h); no atomics or shuffles, which no kernel uses. What is not known raises
PtxError. Hardware's approximations (ex2.approx, rcp.approx, div.approx) and tensor cores round in their own way.
"""
