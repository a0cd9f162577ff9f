// The static table of the GPU: which tile a product gets, by architecture, dtype and shape. Numbers are data: how many
// blocks a tile size must give before it is worth taking, chosen from the number of multiprocessors of the
// architecture's usual cards; none was measured. Read by products.cuh.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace fastmlp::cuda {

// Tiles by falling size, for SIMT and tensor cores alike; products.cuh says what stands behind each.
enum TileSize { large_tile, medium_tile, small_tile };
constexpr int tile_sizes = 3;

struct TileRow {
  int architecture;         // and newer, up to the next row's
  int64_t multiprocessors;  // blocks that fill the card once
  int64_t large_from;       // blocks of the large tile from which it is taken
  int64_t medium_from;
  int64_t shared_kib;  // shared memory of a multiprocessor
};

constexpr TileRow tile_rows[] = {
    {75, 40, 40, 40, 64},       // T4; 68 on an RTX 2080 Ti
    {80, 108, 108, 80, 164},    // A100
    {86, 84, 84, 60, 100},      // A6000, RTX 3090
    {89, 128, 128, 90, 100},    // RTX 4090; 142 on an L40
    {90, 132, 132, 100, 228},   // H100
    {100, 148, 148, 110, 228},  // B200
    {120, 170, 170, 120, 100},  // RTX 5090
};

constexpr TileRow tile_row(int architecture) {
  TileRow found = tile_rows[0];
  for (const TileRow& row : tile_rows) {
    if (row.architecture <= architecture) found = row;
  }
  return found;
}

// Sums over so few terms of k are not cut further.
constexpr int64_t shortest_part = 256;
constexpr int64_t most_parts = 64;

}  // namespace fastmlp::cuda
