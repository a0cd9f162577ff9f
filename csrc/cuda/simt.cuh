// Products on the ordinary arithmetic units: float32 and float64, and 16-bit dtypes where there are no tensor cores for
// them. A block computes a tile of C; each thread TM x TN of its elements, in groups of 16 bytes, which come from
// shared memory at once. Launched by products.cuh.
#pragma once

#include "epilogue.cuh"

namespace fastmlp::cuda {

// A thread's share of the operand tiles lies in registers while the tile before it is multiplied.
template <int BM_, int BN_, int BK_, int TM_, int TN_> struct SimtTile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, TM = TM_, TN = TN_;
  static constexpr int threads = BM / TM * (BN / TN);
  static constexpr int passes = TM / 4;         // of the epilogue, each with four rows of every thread
  static constexpr int sharers = threads / BM;  // threads that sum one row of A
};

// One operand's way from global memory, through a thread's registers, to a tile [BK][rows] in shared memory. A thread's
// vectors lie at equal distances; neighbouring threads read neighbouring memory and write different banks.
template <class S, class Tile, int rows, Read read> class Loader {
 public:
  using C = Compute<S>;
  static constexpr int BK = Tile::BK, threads = Tile::threads;
  static constexpr int vector = read == Read::elements ? 1 : per_16_bytes<S>;
  static constexpr int count = rows * BK / vector / threads;
  static_assert(rows * BK % (vector * threads) == 0, "the tile is dealt out evenly");
  using Buffer = C[BK][rows + 4];

  // From row `first` of `size` rows on, and from k on, `depth_inside` of it.
  __device__ Loader(const Operand<S>& operand, int64_t first, int64_t size, int64_t k, int depth_inside) {
    // Unsigned and known to be so small: what does not follow from it would cost registers in the main loop.
    const unsigned t = threadIdx.x % threads;
    if constexpr (read == Read::along_k) {
      // Two vectors of a row, then the next row: whole sectors of 32 bytes.
      static_assert(count == 1 || threads % (2 * rows) == 0);
      row = t / 2 % rows;
      depth = (t % 2 + t / (2 * rows) * 2) * vector;
    } else if constexpr (read == Read::along_rows) {
      static_assert(threads % (rows / vector) == 0);
      row = t % (rows / vector) * vector;
      depth = t / (rows / vector);
    } else {
      static_assert(threads % rows == 0 && threads % BK == 0);
      k_first = operand.k_stride == 1;
      row = k_first ? t / BK : t % rows;
      depth = k_first ? t % BK : t / rows;
    }
    const int64_t stride = read == Read::along_rows ? 1 : operand.stride;
    const int64_t k_stride = read == Read::along_k ? 1 : operand.k_stride;
    const int64_t left = size - first;
    rows_left = int(left < rows ? left : rows) - row;
    // All vectors of a thread are of the same rows. Outside, others are read for them, since what comes of it is
    // dropped.
    const int64_t read_row = read != Read::elements && row >= left ? left - (read == Read::along_k ? 1 : vector) : row;
    from = operand.data + (first + read_row) * stride + (k + depth) * k_stride;
    hop = row_hop() * stride + depth_hop() * k_stride;
    step = BK * k_stride;
    depth_left = depth_inside - depth;
  }

  // The next tile; zeros outside. A vector is never half outside.
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < count; i++) {
      const bool row_inside = read != Read::elements || i * row_hop() < rows_left;
      staged[i] = {};
      if (row_inside && i * depth_hop() < depth_left)
        staged[i] = *reinterpret_cast<const Vec<S, vector>*>(from + i * hop);
    }
    from += step;
    depth_left -= BK;
  }

  __device__ __forceinline__ void store(Buffer& to) const {
#pragma unroll
    for (int i = 0; i < count; i++) {
#pragma unroll
      for (int e = 0; e < vector; e++) {
        constexpr bool along_k = read == Read::along_k;
        to[depth + i * depth_hop() + (along_k ? e : 0)][row + i * row_hop() + (along_k ? 0 : e)] =
            widen(staged[i].element[e]);
      }
    }
  }

 private:
  // From one vector of the thread to its next, in rows and in k.
  __device__ __forceinline__ int row_hop() const { return read == Read::elements && k_first ? threads / BK : 0; }
  __device__ __forceinline__ int depth_hop() const {
    if constexpr (read == Read::elements) return k_first ? 0 : threads / rows;
    return threads / (read == Read::along_k ? rows : rows / vector) * (read == Read::along_k ? vector : 1);
  }

  const S* from;
  int64_t hop, step;     // from one vector of the thread to its next, and from tile to tile
  int row, depth;        // of the thread's first vector in the tile
  bool k_first = false;  // elements one after another in memory are so along k
  int rows_left;         // of the operand, from that one on
  int depth_left;        // the same of k, in the next tile
  Vec<S, vector> staged[count];
};

template <class C, class Tile> union SimtShared {
  struct {
    C a[2][Tile::BK][Tile::BM + 4];
    C b[2][Tile::BK][Tile::BN + 4];
  } operands;
  Slab<C, Tile::BM / Tile::passes, Tile::BN> slab;
  C row_sums[Tile::sharers][Tile::BM];
};

struct TilePlace {
  unsigned row, column;
};

template <class C> __device__ __forceinline__ void load_group(C* to, const C* from) {
  const auto group = *reinterpret_cast<const Vec<C, per_16_bytes<C>>*>(from);
#pragma unroll
  for (int e = 0; e < per_16_bytes<C>; e++) to[e] = group.element[e];
}

template <class S, class Tile, Read read_a, Read read_b, Epilogue epilogue>
__global__ void __launch_bounds__(Tile::threads, Tile::threads == 256 ? 2 : 1) simt_product(const Product<S> p) {
  using C = Compute<S>;
  constexpr int BM = Tile::BM, BN = Tile::BN, BK = Tile::BK, TM = Tile::TM, TN = Tile::TN;
  constexpr int group = per_16_bytes<C>;
  constexpr int group_rows = BM / (TM / group), group_columns = BN / (TN / group);
  auto& memory = shared<SimtShared<C, Tile>>();
  const int tx = threadIdx.x % (BN / TN) * group, ty = threadIdx.x / (BN / TN) * group;
  const unsigned column_tiles = unsigned((p.n + BN - 1) / BN);
  const unsigned row_tile = blockIdx.x / column_tiles, column_tile = blockIdx.x % column_tiles;
  const int64_t k_begin = blockIdx.z * p.part;
  const int64_t k_end = k_begin + p.part < p.k ? k_begin + p.part : p.k;
  // For the epilogue: registers are scarce until then.
  auto& place = shared<TilePlace>();
  if (threadIdx.x == 0) place = {row_tile, column_tile};
  int left = int(k_end - k_begin);  // of k
  Loader<S, Tile, BM, read_a> a(p.a, int64_t(row_tile) * BM, p.m, k_begin, left);
  Loader<S, Tile, BN, read_b> b(p.b, int64_t(column_tile) * BN, p.n, k_begin, left);
  C sums[TM][TN] = {};
  // Each row of A is read by every column of tiles; the first one sums it.
  const bool sums_rows = epilogue == Epilogue::wgrad && column_tile == 0 && p.row_sums;
  const int sharer = threadIdx.x / BM, row_to_sum = threadIdx.x % BM;
  C row_sum = 0;

  a.load();
  b.load();
  a.store(memory.operands.a[0]);
  b.store(memory.operands.b[0]);
  __syncthreads();
  const auto multiply_tile = [&](int stage) {
    // Zeros behind the last tile: without a branch, loads stay ahead of the products.
    a.load();
    b.load();
#pragma unroll
    for (int kk = 0; kk < BK; kk++) {
      C rows[TM], columns[TN];
#pragma unroll
      for (int i = 0; i < TM; i += group)
        load_group(rows + i, &memory.operands.a[stage][kk][i / group * group_rows + ty]);
#pragma unroll
      for (int j = 0; j < TN; j += group)
        load_group(columns + j, &memory.operands.b[stage][kk][j / group * group_columns + tx]);
#pragma unroll
      for (int i = 0; i < TM; i++) {
#pragma unroll
        for (int j = 0; j < TN; j++) sums[i][j] += rows[i] * columns[j];
      }
    }
    if constexpr (epilogue == Epilogue::wgrad) {
      constexpr int depths = BK / Tile::sharers;
      if (sums_rows) {
#pragma unroll
        for (int d = 0; d < depths; d++) row_sum += memory.operands.a[stage][sharer * depths + d][row_to_sum];
      }
    }
    a.store(memory.operands.a[stage ^ 1]);
    b.store(memory.operands.b[stage ^ 1]);
    __syncthreads();
    left -= BK;
  };
  if constexpr (read_a == Read::elements) {
    // One at a time: with the addresses of single elements for two tiles, registers would not suffice.
    int stage = 0;
#pragma unroll 1
    for (; left > 0; stage ^= 1) multiply_tile(stage);
  } else {
    // Two at a time, so that a stage's addresses are constants.
#pragma unroll 1
    while (left > 0) {
      multiply_tile(0);
      if (left <= 0) break;
      multiply_tile(1);
    }
  }

  const unsigned thread = read_thread_index();
  if constexpr (epilogue == Epilogue::wgrad) {
    if (sums_rows) {
      memory.row_sums[thread / BM][thread % BM] = row_sum;
      finish_row_sums(p, memory.row_sums, int64_t(place.row) * BM, blockIdx.z);
    }
  }

  const int slab_column = thread % (BN / TN) * group, slab_row = thread / (BN / TN) * group;
  constexpr int slab_rows = BM / Tile::passes;
  using RowSlab = Slab<C, slab_rows, BN>;
  Finisher<S, epilogue, RowSlab, Tile::threads> finisher(p, int64_t(place.row) * BM, int64_t(place.column) * BN,
                                                         blockIdx.z);
  // Unrolled, so that the registers of the sums that went out are free.
#pragma unroll
  for (int pass = 0; pass < Tile::passes; pass++) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      C* const line = memory.slab.sums[i / group * group_rows + slab_row + i % group];
#pragma unroll
      for (int j = 0; j < TN; j++) line[j / group * group_columns + slab_column + j % group] = sums[pass * 4 + i][j];
    }
    __syncthreads();
    finisher.finish(memory.slab, [&](int r) { return pass * slab_rows + r; });
  }
  finisher.finish_columns(memory.slab, place.row);
}

}  // namespace fastmlp::cuda
