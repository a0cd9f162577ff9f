// What products cost on a GPU, by which products.cuh picks a tile: data, by architecture, dtype, epilogue and shape.
// Costs were fitted to an H100's times of 44 shapes, all tiles and the library's product (tools/tune_cuda.py); other
// cards take them with their own number of multiprocessors. Read by products.cuh and the fused strategy.
#pragma once

#include <algorithm>
#include <cstdint>

#include "product.h"

namespace fastmlp::cuda {

// Tiles by falling size, for SIMT and tensor cores alike; products.cuh says what stands behind each. Or no tile of ours
// but the library that PyTorch calls.
enum TileSize { large_tile, medium_tile, small_tile, library_call };
constexpr int tile_sizes = 3;

struct TileRow {
  int architecture;         // and newer, up to the next row's
  int64_t multiprocessors;  // of the usual card
  int64_t shared_kib;       // shared memory of a multiprocessor
};

constexpr TileRow tile_rows[] = {
    {75, 40, 64},     // T4; 68 on an RTX 2080 Ti
    {80, 108, 164},   // A100
    {86, 84, 100},    // A6000, RTX 3090
    {89, 128, 100},   // RTX 4090; 142 on an L40
    {90, 132, 228},   // H100
    {100, 148, 228},  // B200
    {120, 170, 100},  // RTX 5090
};

constexpr TileRow tile_row(int architecture) {
  TileRow found = tile_rows[0];
  for (const TileRow& row : tile_rows) {
    if (row.architecture <= architecture) found = row;
  }
  return found;
}

// Microseconds: of a launch; for each term of k where a block is alone on its multiprocessor, and for each block that
// shares it; for each block's epilogue.
struct TileCost {
  double start, latency, term, finish;
};

// Microseconds of a call, with what the host takes longer than for a kernel of ours, and what the passes after it cost;
// TFLOP/s and TB/s.
struct LibraryCost {
  double start, tflops, tbytes;
};

struct Costs {
  TileCost tile[tile_sizes];
  LibraryCost library;
};

enum class CostKind { float32, float64, tensor_cores };

// clang-format off
constexpr Costs all_costs[3][3] = {
    {{{{3.58, 0.0077, 0.0933, 1.742}, {2.88, 0.0371, 0.0364, 0.430}, {2.56, 0.0206, 0.0117, 0.131}}, {8.16, 41.7, 1.50}},
     {{{2.41, 0.0001, 0.0969, 7.327}, {3.30, 0.0373, 0.0319, 2.199}, {4.47, 0.0197, 0.0096, 0.701}}, {12.79, 45.4, 1.39}},
     {{{0.46, 0.1142, 0.0896, 2.742}, {1.43, 0.0411, 0.0311, 0.706}, {1.58, 0.0264, 0.0086, 0.194}}, {5.94, 47.1, 1.99}}},
    {{{{2.71, 0.0019, 0.1031, 0.994}, {2.71, 0.0019, 0.1031, 0.994}, {2.15, 0.0392, 0.0313, 0.243}}, {8.90, 25.6, 1.86}},
     {{{2.72, 0.0001, 0.0953, 3.359}, {2.72, 0.0001, 0.0953, 3.359}, {4.39, 0.0399, 0.0276, 0.979}}, {9.50, 49.7, 1.80}},
     {{{2.40, 0.1050, 0.0914, 1.562}, {2.40, 0.1050, 0.0914, 1.562}, {1.59, 0.0383, 0.0274, 0.368}}, {5.22, 53.1, 2.24}}},
    {{{{4.35, 0.0164, 0.0097, 2.747}, {2.89, 0.0093, 0.0044, 0.495}, {2.41, 0.0036, 0.0021, 0.183}}, {5.28, 741.0, 3.15}},
     {{{3.31, 0.0014, 0.0115, 9.154}, {5.06, 0.0080, 0.0037, 1.124}, {4.33, 0.0034, 0.0019, 0.663}}, {9.03, 579.0, 1.99}},
     {{{3.45, 0.0210, 0.0103, 1.853}, {2.29, 0.0115, 0.0037, 0.462}, {2.02, 0.0054, 0.0027, 0.177}}, {5.35, 773.0, 2.67}}},
};
// clang-format on

constexpr const Costs& costs_of(CostKind kind, Epilogue epilogue) { return all_costs[int(kind)][int(epilogue)]; }

// For `waves` blocks on each multiprocessor, each with sums over k terms.
constexpr double tile_cost(const TileCost& cost, int64_t waves, int64_t k) {
  return cost.start + std::max(double(k) * cost.latency, double(waves) * (double(k) * cost.term + cost.finish));
}

constexpr double library_cost(const LibraryCost& cost, int64_t m, int64_t n, int64_t k, size_t element_bytes) {
  const double products = 2e-6 * double(m) * double(n) * double(k);
  const double bytes = 1e-6 * double(element_bytes) * (double(m) * double(k) + double(n) * double(k) + double(m) * double(n));
  return cost.start + std::max(products / cost.tflops, bytes / cost.tbytes);
}

// What reading operands element by element multiplies the cost of a tile by.
constexpr double cost_of_elements = 1.5;

// Cards whose library has instructions that our kernels do not use (wgmma, tcgen05). Measured on sm_90; sm_100 is taken
// to be like it. Elsewhere the library is called where the user has measured it to be the faster.
constexpr bool library_has_costs(int architecture) { return architecture >= 90 && architecture < 120; }

// Sums over so few terms of k are not cut further.
constexpr int64_t shortest_part = 256;
constexpr int64_t most_parts = 64;

}  // namespace fastmlp::cuda
