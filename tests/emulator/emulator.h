// CUDA on the CPU, for tests: csrc/cuda/device.h includes this in place of CUDA when a host compiler reads it. Here is
// CUDA's vocabulary; fibers.h runs threads, launch.h runs blocks, instructions.h has what device.h has as PTX, and
// timeline.h has events.
//
// Every thread of a block is a fiber; blocks run one after another, on the calling thread, one launch at a time. Fibers
// switch at barriers and warp functions only, in the order that FASTMLP_EMULATOR_ORDER (or set_order) says: fifo, lifo,
// or a number, the seed of a random one.
//
// It finds by itself: diverging barriers, deadlocks, too much shared memory, wrong launches, unaligned copies. Shared
// memory starts as NaN in every block and asynchronous copies land only at their wait, so that a read too early shows
// in the result. Compiled with -fsanitize=address, accesses out of bounds of global memory and of shared objects; with
// alignment, vectors at wrong addresses; with thread, missing barriers and races between blocks.
//
// Limits: x86-64, g++; full warps; no atomics, named barriers, clusters, TMA or wgmma; no weak memory order; mma sums
// in ascending k in float32, where tensor cores round in their own way.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// Of the fiber that runs now.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#include "fibers.h"
#include "translated.h"
#include "timeline.h"
#include "launch.h"
#include "instructions.h"
