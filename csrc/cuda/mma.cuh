// Products on tensor cores: float16 and bfloat16, summed in float32. A block computes a tile of C, each warp a part of
// it by mma.m16n8k16. Operand tiles come by asynchronous copies, some stages ahead; before sm_80, and where operands
// are read element by element, they come through registers. Launched by products.cuh; fragments.cuh uses OperandTile.
#pragma once

#include <type_traits>

#include "epilogue.cuh"

namespace fastmlp::cuda {

// WM x WN is a warp's part of the tile.
template <int BM_, int BN_, int BK_, int WM_, int WN_, Staging staging_> struct MmaTile {
  static constexpr int BM = BM_, BN = BN_, BK = BK_, WM = WM_, WN = WN_;
  static constexpr int warp_columns = BN / WN;
  static constexpr int threads = BM / WM * warp_columns * 32;
  static constexpr Staging staging = staging_of<staging_>;
  // Rows of each warp that the epilogue takes at once.
  static constexpr int pass_rows = WM < 32 ? WM : 32;
  static constexpr int passes = WM / pass_rows;
};

constexpr int chunk_elements = 8;  // 16 bytes: what one copy, and one row of a matrix for ldmatrix, holds

// An operand's tile in shared memory: lines [rows][BK], or [BK][rows] where the operand lies along its rows. The chunks
// of a line are permuted by the line's number, so that the eight rows of a matrix lie in different banks: chunk c of
// line l at place c ^ (l / lines_of_banks % permuted). The permutation repeats after eight lines.
template <class S, int rows, int BK, bool along_rows_> struct OperandTile {
  static constexpr bool along_rows = along_rows_;
  static constexpr int lines = along_rows ? BK : rows, length = along_rows ? rows : BK;
  static constexpr int chunks = length / chunk_elements;              // of a line
  static constexpr int lines_of_banks = chunks < 8 ? 8 / chunks : 1;  // in 128 bytes, all banks once
  static constexpr int permuted = chunks < 8 ? chunks : 8;
  static_assert(length % 16 == 0 && (length & (length - 1)) == 0, "a fragment's place is found by exclusive or");

  alignas(128) S elements[lines * length];

  static __device__ __forceinline__ int offset(int line, int chunk) {
    return line * length + (chunk ^ (line / lines_of_banks % permuted)) * chunk_elements;
  }

  // Where a lane's part of the fragments begins that start at row or column r. Fragment i of 16 rows, at depth k, is
  // then at place(start, i, k). r and k are multiples of 16: so lines keep their permutation, and exclusive or reaches
  // the chunks, whose bits r and the lane leave free.
  static __device__ __forceinline__ int start_of_a(int r) {
    const int lane = threadIdx.x % 32;
    return along_rows ? offset(lane % 8 + lane / 16 * 8, r / chunk_elements + lane / 8 % 2)
                      : offset(r + lane % 16, lane / 16);
  }
  static __device__ __forceinline__ int start_of_b(int c) {
    const int lane = threadIdx.x % 32;
    return along_rows ? offset(lane % 16, c / chunk_elements + lane / 16)
                      : offset(c + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  static __device__ __forceinline__ int place(int start, int i, int k) {
    return along_rows ? (start ^ (i * 16)) + k * length : (start ^ k) + i * 16 * length;
  }

  // Of a fragment of B, registers 0 and 1 have columns 0 to 7, registers 2 and 3 the other eight.
  __device__ __forceinline__ void load(uint32_t (&fragment)[4], int start, int i, int k) const {
    load_matrices<along_rows>(fragment, elements + place(start, i, k));
  }
};

// Copies a thread's chunks of one operand from global memory to its tile; they lie at equal distances. What does not
// come by asynchronous copies is loaded into registers before the products of a tile, and stored after them.
template <class S, class Tile, int rows, Read read> class Copier {
 public:
  using Target = OperandTile<S, rows, Tile::BK, read == Read::along_rows>;
  static constexpr int threads = Tile::threads, chunks = Target::chunks;
  static constexpr int count = Target::lines * chunks / threads;
  static_assert(Target::lines * chunks % threads == 0, "the tile is dealt out evenly");
  static constexpr bool asynchronous = read != Read::elements && Tile::staging == Staging::asynchronous;

  // From row `first` of `size` rows on, and k on.
  __device__ Copier(const Operand<S>& operand, int64_t first, int64_t size, int64_t k)
      : rows_left(size - first < rows ? int(size - first) : rows) {
    stride = read == Read::along_rows ? 1 : operand.stride;
    k_stride = read == Read::along_k ? 1 : operand.k_stride;
    const int t = int(threadIdx.x);
    // Neighbouring threads read neighbouring memory.
    lines_first = read == Read::elements && k_stride != 1;
    line = lines_first ? t % Target::lines : t / chunks;
    chunk = lines_first ? t / Target::lines : t % chunks;
    const int row = Target::along_rows ? chunk * chunk_elements : line;
    const int depth = Target::along_rows ? line : chunk * chunk_elements;
    from = operand.data + (first + row) * stride + (k + depth) * k_stride;
  }

  // Loads the next tile, of which only `depth_left` terms of k exist if these are fewer than BK; the rest becomes zero.
  // The tile is in `to` after store(to), or after the wait for asynchronous copies.
  __device__ __forceinline__ void load(Target& to, int depth_left) {
    if constexpr (read == Read::elements) {
      gather(depth_left);
    } else {
      // How many lines exist for this chunk: none if the chunk itself is past the end.
      const int lines_left = chunk * chunk_elements < (Target::along_rows ? rows_left : depth_left)
                                 ? (Target::along_rows ? depth_left : rows_left)
                                 : 0;
      const int64_t distance = hop * (Target::along_rows ? k_stride : stride);
#pragma unroll
      for (int i = 0; i < count; i++) {
        const bool inside = line + i * hop < lines_left;
        if constexpr (asynchronous) {
          copy_async16_if(inside, place(to, i), from + i * distance);
        } else {
          staged[i] = {};
          if (inside) staged[i] = *reinterpret_cast<const uint4*>(from + i * distance);
        }
      }
    }
    from += Tile::BK * k_stride;
  }

  __device__ __forceinline__ void store(Target& to) const {
    if constexpr (!asynchronous) {
#pragma unroll
      for (int i = 0; i < count; i++) store_shared16(place(to, i), staged[i]);
    }
  }

 private:
  static constexpr int hop = threads / chunks;  // lines, from one chunk of the thread to its next
  static_assert(threads % chunks == 0 && hop % 8 == 0, "a thread's lines have the same permutation");

  __device__ __forceinline__ S* place(Target& to, int i) const {
    if (lines_first) return to.elements + Target::offset(line, chunk + i * chunk_hop());
    return to.elements + Target::offset(line, chunk) + i * hop * Target::length;
  }

  // From one chunk of the thread to its next, of elements: either in another line or in the same one.
  __device__ __forceinline__ int line_hop() const { return lines_first ? 0 : hop; }
  __device__ __forceinline__ int chunk_hop() const { return lines_first ? threads / Target::lines : 0; }

  // Goes from element to element, because with an address computed for each, registers would not suffice.
  __device__ __forceinline__ void gather(int depth_left) {
    static_assert(threads % Target::lines == 0);
    const int64_t turn = line_hop() * stride + (chunk_hop() - 1) * chunk_elements * k_stride;
    const S* source = from;
#pragma unroll
    for (int i = 0; i < count; i++) {
      const int inside =
          line + i * line_hop() < rows_left ? depth_left - (chunk + i * chunk_hop()) * chunk_elements : 0;
      uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < chunk_elements; e++) {
        if (e < inside) words[e / 2] |= uint32_t(source->bits) << e % 2 * 16;
        source += k_stride;
      }
      staged[i] = {words[0], words[1], words[2], words[3]};
      source += turn;
    }
  }

  const S* from;  // the thread's first chunk of the next tile
  int64_t stride, k_stride;
  int line, chunk, rows_left;
  bool lines_first;                        // neighbouring threads have neighbouring lines
  uint4 staged[asynchronous ? 1 : count];  // words: elements of 16 bits would be taken apart and put together
};

template <class A, class B, class Slab, class RowSums, int stages> union MmaShared {
  struct {
    A a[stages];
    B b[stages];
  } operands;
  Slab slab;
  RowSums row_sums;
};

// sums += a warp's products of one tile of k. With `sums_rows` it also adds up A's rows, by a product with a column of
// ones; warps beside each other have the same rows, and each takes some of the depths.
template <class S, class Tile, bool sums_rows, class A, class B>
__device__ __forceinline__ void multiply_stage(float (&sums)[Tile::WM / 16][Tile::WN / 8][4],
                                               float (&row_sums)[Tile::WM / 16][4], const A& a, const B& b, int start_a,
                                               int start_b, int warp_column) {
#pragma unroll
  for (int k = 0; k < Tile::BK; k += 16) {
    uint32_t rows[Tile::WM / 16][4], columns[Tile::WN / 16][4];
#pragma unroll
    for (int i = 0; i < Tile::WM / 16; i++) a.load(rows[i], start_a, i, k);
#pragma unroll
    for (int j = 0; j < Tile::WN / 16; j++) b.load(columns[j], start_b, j, k);
#pragma unroll
    for (int i = 0; i < Tile::WM / 16; i++) {
#pragma unroll
      for (int j = 0; j < Tile::WN / 8; j++)
        multiply_add(sums[i][j], rows[i], columns[j / 2][j % 2 * 2], columns[j / 2][j % 2 * 2 + 1], S{});
    }
    if constexpr (sums_rows) {
      const uint32_t ones = Narrow<S>::from(1).bits * 0x10001u;
      if (k / 16 % Tile::warp_columns == warp_column) {
#pragma unroll
        for (int i = 0; i < Tile::WM / 16; i++) multiply_add(row_sums[i], rows[i], ones, ones, S{});
      }
    }
  }
}

// Writes a warp's sums of rows to shared memory. All columns of that product are the same; a lane has rows lane / 4 and
// lane / 4 + 8 of each fragment.
template <int fragments, int rows>
__device__ __forceinline__ void put_row_sums(float (&to)[rows], const float (&row_sums)[fragments][4], int first_row) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < fragments; i++) {
    float* const place = &to[first_row + i * 16 + lane / 4];
    if (lane % 4 == 0) place[0] = row_sums[i][0], place[8] = row_sums[i][2];
  }
}

// Writes a warp's sums of one pass to the slab.
template <class Tile, class Slab>
__device__ __forceinline__ void put_sums(Slab& slab, const float (&sums)[Tile::WM / 16][Tile::WN / 8][4], int pass,
                                         int warp_row, int warp_column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile::pass_rows / 16; i++) {
#pragma unroll
    for (int j = 0; j < Tile::WN / 8; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = warp_row * Tile::pass_rows + i * 16 + lane / 4 + e / 2 * 8;
        slab.sums[row][warp_column * Tile::WN + j * 8 + lane % 4 * 2 + e % 2] =
            sums[pass * (Tile::pass_rows / 16) + i][j][e];
      }
    }
  }
}

// Where operands are read by elements, the bound of one block of a multiprocessor asks for nothing, but without it the
// compiler spills registers to let more blocks in.
template <class S, class Tile, Read read_a, Read read_b, Epilogue epilogue>
__global__ void __launch_bounds__(Tile::threads, read_a == Read::elements ? 1 : 0) mma_product(const Product<S> p) {
  constexpr int BM = Tile::BM, BN = Tile::BN, BK = Tile::BK, WM = Tile::WM, WN = Tile::WN;
  using CopierA = Copier<S, Tile, BM, read_a>;
  using CopierB = Copier<S, Tile, BN, read_b>;
  constexpr bool asynchronous = CopierA::asynchronous && CopierB::asynchronous;
  // Through registers, one tile is on its way while another one is multiplied; copies have two on their way.
  constexpr int stages = asynchronous ? 3 : 2;
  // Rows begin eight banks apart, because a warp writes two columns of four lanes in each of several rows at once.
  using RowSlab = Slab<float, BM / Tile::passes, BN, 8>;
  using RowSums = float[Tile::warp_columns][BM];
  auto& memory = shared<MmaShared<typename CopierA::Target, typename CopierB::Target, RowSlab, RowSums, stages>>();
  const int warp = threadIdx.x / 32;
  const int warp_row = warp / Tile::warp_columns, warp_column = warp % Tile::warp_columns;
  const TilePlace place = tile_of_block<Tile>(p);
  const TermsOfSum terms = terms_of_block(p);
  CopierA a(p.a, int64_t(place.row) * BM, p.m, terms.first);
  CopierB b(p.b, int64_t(place.column) * BN, p.n, terms.first);
  // Each tile of k has one group of copies, which is empty past the end. What goes through registers is zero there, not
  // left out, because without a branch loads stay ahead of the products.
  const auto load = [&](int stage, int left) {
    if (asynchronous && left <= 0) return commit_copies();
    a.load(memory.operands.a[stage], left);
    b.load(memory.operands.b[stage], left);
    commit_copies();
  };
  const auto store = [&](int stage) {
    a.store(memory.operands.a[stage]);
    b.store(memory.operands.b[stage]);
  };
  const int start_a = CopierA::Target::start_of_a(warp_row * WM),
            start_b = CopierB::Target::start_of_b(warp_column * WN);
  float sums[WM / 16][WN / 8][4] = {};
  int left = terms.count;
#pragma unroll
  for (int stage = 0; stage + 1 < stages; stage++) {
    load(stage, left - stage * BK);
    store(stage);
  }
  const auto multiply_tiles = [&](auto sums_rows) {
    float row_sums[WM / 16][4] = {};
    int stage = 0;
#pragma unroll 1
    for (; left > 0; left -= BK) {
      wait_for_copies<stages - 2>();
      __syncthreads();
      // The stage that all threads had read before this barrier takes the next tile.
      const int next = stage == 0 ? stages - 1 : stage - 1;
      load(next, left - (stages - 1) * BK);
      multiply_stage<S, Tile, sums_rows>(sums, row_sums, memory.operands.a[stage], memory.operands.b[stage], start_a,
                                         start_b, warp_column);
      store(next);
      stage = stage + 1 == stages ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    if constexpr (sums_rows) {
      __syncthreads();
      put_row_sums(memory.row_sums[warp_column], row_sums, warp_row * WM);
      finish_row_sums(p, memory.row_sums, int64_t(place.row) * BM, blockIdx.z);
    }
  };
  // Every column of tiles reads the same rows; the first one sums them.
  if (epilogue == Epilogue::wgrad && place.column == 0 && p.row_sums) {
    if constexpr (epilogue == Epilogue::wgrad) multiply_tiles(std::true_type());
  } else {
    multiply_tiles(std::false_type());
  }
  finish_tile<Tile, epilogue>(
      p, memory.slab, place, [&](int pass) { put_sums<Tile>(memory.slab, sums, pass, warp_row, warp_column); },
      [](int pass, int r) { return r / Tile::pass_rows * WM + pass * Tile::pass_rows + r % Tile::pass_rows; });
}

}  // namespace fastmlp::cuda
