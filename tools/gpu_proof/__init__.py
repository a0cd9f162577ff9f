"""What can be proved of the CUDA kernels without a GPU; `make gpu-proof` runs it, docs/gpu.md explains it."""
