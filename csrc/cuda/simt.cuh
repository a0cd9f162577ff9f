// Products on the ordinary arithmetic units: float32, float64, and bfloat16 where there are no tensor cores for it. A
// block computes a tile of C, and each thread TM x TN of its elements, in groups whose operands are 16 bytes of shared
// memory each. Launched by products.cuh; fused.cuh uses the loader and the tiles.
#pragma once

#include "epilogue.cuh"

namespace fastmlp::cuda {

// The shape of a block's work: its tile of C, BK terms of k at a time, and TM x TN elements for each thread.
template <int BM_, int BN_, int BK_, int TM_, int TN_> struct SimtTile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, TM = TM_, TN = TN_;
  static constexpr int threads = BM / TM * (BN / TN);
  static constexpr int passes = TM / 4;         // of the epilogue, each with four rows of every thread
  static constexpr int sharers = threads / BM;  // threads that sum one row of A
};

// Where a thread's TM x TN sums lie in the tile: in groups of 16 bytes, which lie at equal distances.
template <class Tile, class C> struct ThreadPlace {
  static constexpr int group = per_16_bytes<C>;
  static constexpr int group_rows = Tile::BM / (Tile::TM / group), group_columns = Tile::BN / (Tile::TN / group);
  int first_row, first_column;

  __device__ __forceinline__ explicit ThreadPlace(unsigned thread)
      : first_row(thread / (Tile::BN / Tile::TN) * group), first_column(thread % (Tile::BN / Tile::TN) * group) {}
  __device__ __forceinline__ int row(int i) const { return i / group * group_rows + first_row + i % group; }
  __device__ __forceinline__ int column(int j) const { return j / group * group_columns + first_column + j % group; }
};

// Loads a thread's vectors of one operand from global memory into registers, where they stay while the tile before is
// multiplied, and stores them to a tile [BK][rows] in shared memory. The vectors lie at equal distances; neighbouring
// threads read neighbouring memory and write different banks.
template <class S, class Tile, int rows, Read read> class Loader {
 public:
  using C = Compute<S>;
  static constexpr int BK = Tile::BK, threads = Tile::threads;
  static constexpr int vector = read == Read::elements ? 1 : per_16_bytes<S>;
  static constexpr int count = rows * BK / vector / threads;
  static_assert(rows * BK % (vector * threads) == 0, "the tile is dealt out evenly");
  using Buffer = C[BK][rows + 4];

  // The operand has `size` rows, of which the tile begins at row `first`, and `depth_inside` terms from k on.
  __device__ Loader(const Operand<S>& operand, int64_t first, int64_t size, int64_t k, int depth_inside) {
    // Unsigned and with a known bound, from which the compiler concludes what would else cost registers in the main
    // loop.
    const unsigned t = threadIdx.x % threads;
    if constexpr (read == Read::along_k) {
      // Neighbouring threads take two vectors of a row before the next row, which are whole sectors of 32 bytes.
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
    // All vectors of a thread are of the same rows. In place of rows past the end it reads others, because what is
    // computed from them is dropped.
    const int64_t read_row = read != Read::elements && row >= left ? left - (read == Read::along_k ? 1 : vector) : row;
    from = operand.data + (first + read_row) * stride + (k + depth) * k_stride;
    hop = row_hop() * stride + depth_hop() * k_stride;
    step = BK * k_stride;
    depth_left = depth_inside - depth;
  }

  // Loads the next tile, with zeros past the end. A vector never straddles the end.
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

template <class C> __device__ __forceinline__ void load_group(C* to, const C* from) {
  const auto group = *reinterpret_cast<const Vec<C, per_16_bytes<C>>*>(from);
#pragma unroll
  for (int e = 0; e < per_16_bytes<C>; e++) to[e] = group.element[e];
}

// sums[i][j] += rows[i] * columns[j].
template <class C, int TM, int TN>
__device__ __forceinline__ void add_outer_product(C (&sums)[TM][TN], const C (&rows)[TM], const C (&columns)[TN]) {
#pragma unroll
  for (int i = 0; i < TM; i++) {
#pragma unroll
    for (int j = 0; j < TN; j++) sums[i][j] += rows[i] * columns[j];
  }
}

// sums += a thread's products of one tile of k, which lies in shared memory.
template <class Tile, class C>
__device__ __forceinline__ void multiply_tile(C (&sums)[Tile::TM][Tile::TN], const C (&a)[Tile::BK][Tile::BM + 4],
                                              const C (&b)[Tile::BK][Tile::BN + 4], ThreadPlace<Tile, C> place) {
#pragma unroll
  for (int k = 0; k < Tile::BK; k++) {
    C rows[Tile::TM], columns[Tile::TN];
#pragma unroll
    for (int i = 0; i < Tile::TM; i += place.group) load_group(rows + i, &a[k][place.row(i)]);
#pragma unroll
    for (int j = 0; j < Tile::TN; j += place.group) load_group(columns + j, &b[k][place.column(j)]);
    add_outer_product(sums, rows, columns);
  }
}

// sum += a thread's share of the sum of a row of A over a tile of k, of which each sharer of the row takes as many
// terms.
template <class Tile, class C> __device__ __forceinline__ void add_row(C& sum, const C (&a)[Tile::BK][Tile::BM + 4]) {
  constexpr int depths = Tile::BK / Tile::sharers;
  const int sharer = threadIdx.x / Tile::BM, row = threadIdx.x % Tile::BM;
#pragma unroll
  for (int d = 0; d < depths; d++) sum += a[sharer * depths + d][row];
}

template <class S, class Tile, Read read_a, Read read_b, Epilogue epilogue>
__global__ void __launch_bounds__(Tile::threads, Tile::threads == 256 ? 2 : 1) simt_product(const Product<S> p) {
  using C = Compute<S>;
  constexpr int BM = Tile::BM, BN = Tile::BN;
  auto& memory = shared<SimtShared<C, Tile>>();
  const ThreadPlace<Tile, C> thread(threadIdx.x);
  const TilePlace tile = tile_of_block<Tile>(p);
  // Kept in shared memory for the epilogue, because registers are scarce until then.
  auto& place = shared<TilePlace>();
  if (threadIdx.x == 0) place = tile;
  const TermsOfSum terms = terms_of_block(p);
  int left = terms.count;
  Loader<S, Tile, BM, read_a> a(p.a, int64_t(tile.row) * BM, p.m, terms.first, left);
  Loader<S, Tile, BN, read_b> b(p.b, int64_t(tile.column) * BN, p.n, terms.first, left);
  C sums[Tile::TM][Tile::TN] = {};
  // Blocks of every column of tiles read the same rows of A; those of the first column sum them.
  const bool sums_rows = epilogue == Epilogue::wgrad && tile.column == 0 && p.row_sums;
  C row_sum = 0;

  a.load();
  b.load();
  a.store(memory.operands.a[0]);
  b.store(memory.operands.b[0]);
  __syncthreads();
  const auto multiply_stage = [&](int stage) {
    // Behind the last tile this loads zeros, because without a branch loads stay ahead of the products.
    a.load();
    b.load();
    multiply_tile<Tile>(sums, memory.operands.a[stage], memory.operands.b[stage], thread);
    if (epilogue == Epilogue::wgrad && sums_rows) add_row<Tile>(row_sum, memory.operands.a[stage]);
    a.store(memory.operands.a[stage ^ 1]);
    b.store(memory.operands.b[stage ^ 1]);
    __syncthreads();
    left -= Tile::BK;
  };
  if constexpr (read_a == Read::elements) {
    // One at a time: with the addresses of single elements for two tiles, registers would not suffice.
    int stage = 0;
#pragma unroll 1
    for (; left > 0; stage ^= 1) multiply_stage(stage);
  } else {
    // Two at a time, so that a stage's addresses are constants.
#pragma unroll 1
    while (left > 0) {
      multiply_stage(0);
      if (left <= 0) break;
      multiply_stage(1);
    }
  }

  const unsigned number = read_thread_index();
  if constexpr (epilogue == Epilogue::wgrad) {
    if (sums_rows) {
      memory.row_sums[number / BM][number % BM] = row_sum;
      finish_row_sums(p, memory.row_sums, int64_t(place.row) * BM, blockIdx.z);
    }
  }
  const ThreadPlace<Tile, C> sender(number);
  constexpr int slab_rows = BM / Tile::passes;
  finish_tile<Tile, epilogue>(
      p, memory.slab, place,
      [&](int pass) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
          for (int j = 0; j < Tile::TN; j++) memory.slab.sums[sender.row(i)][sender.column(j)] = sums[pass * 4 + i][j];
        }
      },
      [](int pass, int r) { return pass * slab_rows + r; });
}

}  // namespace fastmlp::cuda
