// What products cost on a GPU, as data by card, dtype, epilogue and shape. Costs were fitted to an H100's times of 44
// to 46 shapes, for all tiles and the library's product (tools/tune_cuda.py). Other cards take them with their own
// number of multiprocessors, and the library where nobody knows better. Read by product_plan.cuh, fused_plan.cuh and
// narrow.cu; asks no device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fused.h"
#include "product.h"

namespace fastmlp::cuda {

// Tiles by falling size, for SIMT and tensor cores alike; product_plan.cuh says what stands behind each. library_call
// is no tile of ours but the library that PyTorch calls.
enum TileSize { large_tile, medium_tile, small_tile, library_call };
constexpr int tile_sizes = 3;

// What the choices depend on of a card. It is asked of the device, since cards of one architecture differ (an L4 has 58
// multiprocessors, an RTX 4090 128), and a part of a card (MIG) is a smaller card.
struct Card {
  int architecture = 0;  // 80 for compute capability 8.0
  int64_t multiprocessors = 0;
  // Shared memory in bytes: of a multiprocessor; the most that a block may ask for; what CUDA takes of each block's.
  int64_t shared_bytes = 0, block_shared_bytes = 0, reserved_bytes = 0;
};

// How many blocks with so much shared memory a multiprocessor has at once, if its registers are enough for `most`.
constexpr int64_t resident_blocks(const Card& card, int64_t block_bytes, int64_t most) {
  return std::clamp<int64_t>(card.shared_bytes / (block_bytes + card.reserved_bytes), 1, most);
}

// A block asks for no more than every card from sm_80 on has: with that the H100 was measured. sm_75 has less.
constexpr int64_t most_block_shared = 99 << 10;

// Microseconds: of a launch; for each term of k where a block is alone on its multiprocessor, and for each block that
// shares it; for each block's epilogue.
struct TileCost {
  double start, latency, term, finish;
};

// Microseconds of a call, with one for what the host takes longer than for a kernel of ours, and of the passes after
// it; TFLOP/s, and TB/s of operands and of results, which these passes read and write again.
// Forward's pass is an estimate by its bytes: what was measured had ReLU in the library's epilogue.
struct LibraryCost {
  double start, tflops, reads, writes;
};

struct Costs {
  TileCost tile[tile_sizes];
  LibraryCost library;
};

enum class CostKind { float32, float64, tensor_cores };

// clang-format off
constexpr Costs all_costs[3][3] = {
    {{{{5.29, 0.0950, 0.0907, 0.301}, {2.62, 0.0394, 0.0363, 0.363}, {2.65, 0.0181, 0.0116, 0.135}}, {7.98, 47.7, 1.36, 0.94}},
     {{{9.10, 0.0970, 0.0917, 0.662}, {4.77, 0.0371, 0.0328, 1.212}, {4.75, 0.0179, 0.0098, 0.566}}, {10.66, 50.2, 1.92, 0.90}},
     {{{3.36, 0.1016, 0.0913, 0.287}, {1.48, 0.0426, 0.0306, 0.733}, {1.73, 0.0248, 0.0086, 0.179}}, {5.31, 52.2, 1.25, 5.25}}},
    {{{{3.81, 0.1063, 0.1039, 0.249}, {3.80, 0.1064, 0.1039, 0.251}, {2.71, 0.0346, 0.0308, 0.317}}, {5.74, 30.6, 2.21, 0.78}},
     {{{5.02, 0.0030, 0.0969, 0.747}, {3.75, 0.0457, 0.0959, 2.707}, {4.79, 0.0360, 0.0277, 0.729}}, {8.51, 62.7, 2.67, 0.75}},
     {{{3.12, 0.0038, 0.0923, 1.297}, {3.16, 0.0106, 0.0921, 1.300}, {1.75, 0.0346, 0.0253, 0.349}}, {3.84, 58.3, 1.68, 3.68}}},
    {{{{4.84, 0.0159, 0.0100, 2.608}, {2.86, 0.0087, 0.0042, 0.464}, {2.41, 0.0033, 0.0022, 0.189}}, {6.32, 916.3, 2.98, 0.74}},
     {{{3.76, 0.0176, 0.0099, 10.743}, {5.37, 0.0077, 0.0036, 1.185}, {4.09, 0.0042, 0.0020, 0.686}}, {8.63, 857.2, 2.54, 0.75}},
     {{{3.09, 0.0236, 0.0117, 1.932}, {2.01, 0.0117, 0.0039, 0.562}, {1.69, 0.0050, 0.0025, 0.222}}, {3.62, 838.4, 1.54, 3.91}}},
};
// clang-format on

constexpr const Costs& costs_of(CostKind kind, Epilogue epilogue) { return all_costs[int(kind)][int(epilogue)]; }

// What reading operands element by element multiplies the cost of a tile by.
constexpr double cost_of_elements(CostKind kind) { return kind == CostKind::tensor_cores ? 2.0 : 1.1; }

// For `waves` blocks on each multiprocessor, each with sums over k terms.
constexpr double tile_cost(const TileCost& cost, int64_t waves, int64_t k) {
  return cost.start + std::max(double(k) * cost.latency, double(waves) * (double(k) * cost.term + cost.finish));
}

// The multiprocessors of the card that costs were fitted on. Tiles cost what a multiprocessor does; the library's rates
// are the whole card's, so that a smaller one, or a part of it, has its share of them.
constexpr int64_t measured_multiprocessors = 132;

constexpr double library_cost(const LibraryCost& cost, int64_t multiprocessors, int64_t m, int64_t n, int64_t k,
                              size_t element_bytes) {
  const double share = double(multiprocessors) / measured_multiprocessors;
  const double products = 2e-6 * double(m) * double(n) * double(k);
  const double read = 1e-6 * double(element_bytes) * double(k) * (double(m) + double(n));
  const double written = 1e-6 * double(element_bytes) * double(m) * double(n);
  return cost.start + (std::max(products / cost.tflops, read / cost.reads) + written / cost.writes) / share;
}

// Costs were measured on sm_90 alone.
constexpr bool costs_are_measured(int architecture) { return architecture >= 90 && architecture < 100; }

// Cards whose library has instructions that our kernels do not use (wgmma, tcgen05): there it is one of the candidates,
// by its costs. sm_100 is taken to be like sm_90.
constexpr bool library_has_costs(int architecture) { return architecture >= 90 && architecture < 120; }

// Small products are bound by their launches. PyTorch launches a product and a pass over its output, each of which
// takes the host some microseconds; our kernels need no pass. By NVIDIA's data sheets a multiprocessor of any card
// multiplies and adds at least 256 pairs of 16-bit numbers a clock on tensor cores, and one of an sm_80 card 32 pairs
// of float64 without them; its share of the memory's bandwidth is at least 5 GB/s. So these are 8192 clocks and six
// microseconds at most, within the launches' time. That is arithmetic: nothing of it was measured.
constexpr int64_t small_multiply_adds(CostKind kind) {
  return kind == CostKind::float64 ? int64_t(1) << 18 : int64_t(1) << 21;
}
constexpr int64_t small_operand_bytes = 32 << 10;

// Whether a product goes to the library because nobody measured the card, and ours may lose there: products of float64
// on sm_80, whose library multiplies on tensor cores at twice the rate of the units that our kernels use, and 16-bit
// products of wide layers: our large tiles had 53 to 60 % of the library's speed on the H100. Layers of up to
// fused_width features stay ours, in one kernel or not: a product takes about as long as the pass over its output that
// ours saves. So does float32: the library's products run on the same units, unless TF32 is allowed (which
// product_plan.cuh asks first), and our large tiles had 90 to 95 % of their speed on the H100.
constexpr bool library_by_default(const Card& card, CostKind kind, Epilogue epilogue, int64_t m, int64_t n, int64_t k,
                                  size_t element_bytes) {
  if (costs_are_measured(card.architecture)) return false;
  const int64_t features = epilogue == Epilogue::wgrad ? std::max(m, n) : std::max(n, k);
  const bool may_lose =
      kind == CostKind::tensor_cores ? features > fused_width : kind == CostKind::float64 && card.architecture == 80;
  const double multiply_adds = double(m) * double(n) * double(k);
  const double operand_bytes = double(element_bytes) * double(k) * (double(m) + double(n));
  const auto multiprocessors = double(card.multiprocessors);
  const bool is_small = multiply_adds <= multiprocessors * double(small_multiply_adds(kind)) &&
                        operand_bytes <= multiprocessors * double(small_operand_bytes);
  return may_lose && !is_small;
}

// Networks up to this width go through one kernel. Wider ones do where an H100 was faster so than layer by layer: on
// tensor cores, from so many rows on.
constexpr int64_t always_fused_width = 64;
constexpr int64_t wide_fused_rows = 4096;

// Sums over so few terms of k are not cut further.
constexpr int64_t shortest_part = 256;
constexpr int64_t most_parts = 64;

}  // namespace fastmlp::cuda
