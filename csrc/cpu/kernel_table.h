// The contract between the callers of kernels, which are compiled for every processor, and the ISA files, which are
// each compiled for one instruction set: a table of function pointers and tile sizes for each. Filled in
// kernels/kernels.inl, chosen by dispatch.cpp, read by everything in cpu that multiplies. Sizes count elements.
//
//            NR columns of B                  A panel: units of k, each MR lanes, one per row
//         +-------------------+               B panel: units of k, each NR lanes, one per column
//      MR | tile = A * B      |               tile:    MR x NR, row-major
//  rows   +-------------------+               Panels are zero-padded to full MR, NR and units.
//
// S is the dtype in memory, Compute<S> what sums are kept in. A unit is what one lane holds of k: one
// element, converted to Compute<S>, or (k_unit 2) two of 16 bits as they are.
// A function of the table works on one panel, tile or run; it starts no thread and allocates nothing.
#pragma once

#include "../contract/derivatives.h"
#include "../contract/draws.h"
#include "../contract/loss.h"
#include "../contract/problem.h"
#include "../contract/rows.h"
#include "../contract/storage.h"
#include "../contract/update.h"

namespace fastmlp::cpu {

template <class T, class U> constexpr bool same_type = false;
template <class T> constexpr bool same_type<T, T> = true;
// Whether S is the type that is computed in, so that nothing is converted.
template <class S> constexpr bool in_itself = same_type<S, Compute<S>>;

// What follows the products of one tile: the sums over earlier blocks of K, bias, activation, and the
// only rounding to S.
template <class S> struct Epilogue {
  const Compute<S>* tile;
  int64_t tile_step;  // from one row of the tile to the next
  int64_t rows, columns;
  const Compute<S>* sums;  // null, or of earlier blocks of K
  int64_t sums_step;
  S* output;          // may be what sums points to
  S* pre_activation;  // null, or where to keep the pre-activation
  int64_t leading_dimension;
  const Compute<S>* bias;  // null, or `columns` values, readable to the end of a vector
  Scalars scalars;
};

template <class S> struct ActivationKernels {
  void (*epilogue)(const Epilogue<S>&);
  // out[i] = g[i] * act'(saved[i]); out may be g.
  void (*gradient)(int64_t n, const S* g, const S* saved, S* out, Scalars);
  // out[i] = act(pre[i]).
  void (*value)(int64_t n, const S* pre, S* out, Scalars);
};

// The sum of the losses of n elements; writes `scale` times their derivatives. weight: null, or n values.
template <class S>
using ElementLoss = double (*)(int64_t n, const S* output, const S* target, const S* weight, double scale, Scalars,
                               S* grad);

// Moves elements [begin, end) of a parameter.
using UpdateKernel = void (*)(const Update&, int64_t begin, int64_t end);

// Of clipping, on n elements of a gradient: the sum of their squares, and the largest magnitude, which is NaN if there
// is one; their products with a factor; and what clamping between -limit and limit makes of them.
template <class S> struct ClipKernels {
  double (*squares)(int64_t n, const S* x);
  double (*largest)(int64_t n, const S* x);
  void (*scale)(int64_t n, S* x, double factor);
  void (*clamp)(int64_t n, S* x, double limit);
};

// An instruction of an elementwise program on n elements. Operands that it does not have are not read; out may be one
// of them, and be written to the end of a vector if it is padded: what was stored in part is slow to load again.
template <class T>
using ElementKernel = void (*)(int64_t n, const T* a, const T* b, const T* c, T* out, bool padded, Scalars);

// One way to reduce: what a partial result begins with, and how rows or columns of a gapless matrix are added to
// partial results, one for each.
template <class T> struct ElementFolds {
  double start;
  void (*rows)(int64_t rows, int64_t columns, const T* x, double* into);
  void (*columns)(int64_t rows, int64_t columns, const T* x, double* into);
};

constexpr int64_t line_bytes = 64;  // what one prefetch brings

// The products of a panel of A with columns of B, and where they go.
template <class S> struct Tile {
  int64_t k;  // units in the panel, or elements of an unpacked B
  const Compute<S>* a;
  const Compute<S>* b;
  const S* unpacked_b;       // of stream kernels, in place of b: rows gapless along n
  int64_t b_step;            // from one row of unpacked_b, or of row kernels' b, to the next
  int64_t a_step, a_k_step;  // of row kernels, whose a is not packed: from one row to the next, and along k
  bool b_padded;             // of row kernels: b may be read to the end of a vector
  // Null, or memory that is used soon: the micro-kernel prefetches one cache line of each with each unit of k, of the
  // output the next one, of the input one that lies `input_step` bytes further.
  const void* input_ahead;
  const void* output_ahead;
  int64_t input_step = line_bytes;
  int64_t columns;  // nothing is written past these
  // Sums of earlier blocks of K, which these are added to, or the place for them.
  Compute<S>* sums;
  int64_t sums_step;
  bool add;
  // Or, if output is not null, the place for the result itself, to which the kernel applies bias and ReLU.
  S* output;
  int64_t leading_dimension;
  const Compute<S>* bias;  // null, or `columns` values, readable to the end of a vector
  bool relu;
};

template <class S> using Microkernel = void (*)(const Tile<S>&);

// A tile of C of a frozen network: rows of A times columns of B, which lie in several panels of NR.
template <class S> struct PanelTile {
  int64_t units;
  const Compute<S>* a;
  int64_t a_step, a_unit;  // from one row to the next, and along k
  const Compute<S>* b;
  int64_t b_panel;  // from one panel to the next; in a panel, units follow each other
  // Null, or memory that is used soon. Tiles of many rows prefetch it, and move on by so many bytes with each unit of
  // k: evenly, because lines that come from afar keep the core's queue full.
  const void *weights_ahead, *input_ahead;
  int64_t weights_step, input_step;
  int64_t columns;  // nothing is written to the output past these
  // Sums of earlier blocks of K, which these are added to, or the place for them if there is no output; whole vectors.
  Compute<S>* sums;
  int64_t sums_step;
  bool add;
  const Compute<S>* bias;      // null, or of the columns
  const Compute<S>* row_bias;  // null, or of the rows
  S* output;
  int64_t output_step, output_panel;
  bool relu;
};

template <class S> using PanelKernel = void (*)(const PanelTile<S>&);

constexpr int most_panels = 4;  // side by side in a tile

// Passes over the columns of a gapless matrix. Moments of columns are their means, and their sums of squared deviations
// from these.
template <class S> struct BatchNormKernels {
  // Joins rows to `before` earlier ones, whose moments these are; x is the first of `columns`, `step` from row to row.
  void (*add_rows)(int64_t rows, int64_t columns, int64_t step, const S* x, int64_t before, S* mean, S* squares);
  // Joins the moments of `more` rows.
  void (*join)(int64_t columns, int64_t before, S* mean, S* squares, int64_t more, const S* their_mean,
               const S* their_squares);
  // Writes what training makes of the moments of the batch; the sums become 1 / sqrt(variance + eps).
  void (*settle)(const BatchNormPass&, const S* mean, S* squares);
  // 1 / sqrt(variance + eps) of the running variance.
  void (*rstd)(int64_t columns, const S* variance, double eps, S* rstd);
  // Rows [begin, end) of the output.
  void (*normalise)(const BatchNormPass&, int64_t begin, int64_t end, const S* mean, const S* rstd);
  // Adds, over rows, g and g (x - mean).
  void (*add_gradients)(int64_t rows, int64_t columns, int64_t step, const S* g, const S* x, const S* mean, S* plain,
                        S* scaled);
  // Writes the gradients of weight and bias that follow from these sums, which become the two of `gradient`.
  void (*settle_gradients)(const BatchNormBackwardPass&, const S* rstd, S* plain, S* scaled);
  // Rows [begin, end) of the input's gradient, (g - plain - (x - mean) scaled) rstd weight; plain and scaled are null
  // where the mean and rstd do not depend on the input.
  void (*gradient)(const BatchNormBackwardPass&, int64_t begin, int64_t end, const S* rstd, const S* plain,
                   const S* scaled);
};

// The components of contract/derivatives.h of n elements, on their way through an activation. Each component lies
// `step` elements behind the one before it.
template <class S> struct Components {
  int64_t n, step;
  int firsts, seconds;
  const AxisPair* pairs;
  const int* pairs_end;
  const S* pre;  // before the activation
  S* output;     // after it; of `forward` it may be pre
  S* grad;       // of `backward`: the gradient with respect to the output, which becomes that with respect to pre
  Scalars scalars;
};

template <class S> struct ComponentKernels {
  void (*forward)(const Components<S>&);
  // Writes the output again, too.
  void (*backward)(const Components<S>&);
};

template <class S> struct Kernels {
  using C = Compute<S>;
  int64_t mr, nr;      // register tile
  int64_t mc, nc, kc;  // cache blocks: mc a multiple of mr, nc of nr, kc of k_unit
  int64_t chain;       // products that the micro-kernel sums one after another
  int64_t lanes;       // elements of one vector of C; buffers may be read this far past their end
  int64_t k_unit;
  int64_t stream_rows, stream_columns;  // the tile of the stream kernels
  // Lane i of unit u is source[i * stride + p * k_stride] for the p of that unit, zero for i >= count. There may be
  // more rows than lanes.
  void (*pack_a)(const S* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, C* panel);
  void (*pack_b)(const S* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, C* panel);
  // One for each number of rows and of vectors per row that hold anything.
  const Microkernel<S>* microkernels;
  const Microkernel<S>* stream_kernels;
  // Like microkernels, for an a that lies in memory as it is and stays in a cache; k is at most `chain`. Null for
  // the dtypes that are not computed in themselves.
  const Microkernel<S>* row_kernels;
  // For frozen networks: one for each number of rows and vectors; null where registers do not suffice.
  const PanelKernel<S>* panel_kernels;
  const int64_t* panels_side_by_side;  // the most, for each number of rows
  // sums[j] (+)= the sum of column j over `rows` gapless rows.
  void (*column_sums)(int64_t rows, int64_t columns, const S* x, C* sums, bool add);
  // tile (+)= rows of A times columns of B, without packing: both are gapless along k.
  void (*dot_tile)(int64_t rows, int64_t columns, int64_t k, const S* a, int64_t a_stride, const S* b, int64_t b_stride,
                   C* tile, int64_t tile_step, bool add);
  // sums[i] += sum over the panel's `units` of row i; sums holds mr + lanes values.
  void (*panel_sums)(int64_t units, const C* panel, C* sums);
  void (*widen)(int64_t n, const S* x, C* out);
  void (*narrow)(int64_t n, const C* x, S* out);
  const ActivationKernels<S>* activations;
  const ElementLoss<S>* losses;  // null for losses of classes
  // That of one row and the class it belongs to; `weights` is the sum of the weights, or the number of classes.
  double (*cross_entropy)(int64_t classes, const S* output, int64_t target, const S* weight, double weights,
                          double smoothing, double scale, S* grad);
  // The softmax of each of some gapless rows, or its logarithm, in place. No row depends on another.
  void (*head)(int64_t rows, int64_t columns, bool log, S* x);
  const UpdateKernel* updates;
  const ClipKernels<S>* clip;
  // By the numbers of contract/elementwise.h, and sum, max, min. Null for the dtypes that are not computed in
  // themselves.
  const ElementKernel<S>* elements;
  const ElementFolds<S>* element_folds;
  // n numbers of 1 where 53 bits of the generator are below the threshold, and of 0 else. Null for 16 bits.
  void (*bernoulli)(Twister& generator, int64_t threshold, int64_t n, S* output);
  void (*bernoulli_bytes)(Twister& generator, int64_t threshold, int64_t n, uint8_t* output);
  // out[i] = x[i] * (kept[i] ? scale : 0), for bytes of 0 and 1; out may be x. Null for 16 bits.
  void (*drop)(int64_t n, const S* x, const uint8_t* kept, double scale, S* out);
  // Rows [begin, end) of a pass; null for 16 bits. The backward pass adds to weight_sums and bias_sums, which may be
  // null, the shares that its rows have in the gradients of weight and bias.
  void (*layer_norm)(const LayerNormPass&, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const LayerNormBackwardPass&, int64_t begin, int64_t end, S* weight_sums, S* bias_sums);
  const BatchNormKernels<S>* batch_norm;  // null for 16 bits
  const ComponentKernels<S>* components;  // by activation; null for 16 bits
  void (*softmax)(const SoftmaxPass&, int64_t begin, int64_t end);
  void (*softmax_backward)(const SoftmaxBackwardPass&, int64_t begin, int64_t end);

  int64_t units(int64_t k) const { return (k + k_unit - 1) / k_unit; }
  Microkernel<S> microkernel(int64_t rows, int64_t columns) const {
    return microkernels[(rows - 1) * (nr / lanes) + (columns - 1) / lanes];
  }
  Microkernel<S> row_kernel(int64_t rows, int64_t columns) const {
    return row_kernels[(rows - 1) * (nr / lanes) + (columns - 1) / lanes];
  }
  PanelKernel<S> panel_kernel(int64_t rows, int64_t columns) const {
    return panel_kernels[(rows - 1) * (most_panels * (nr / lanes)) + (columns - 1) / lanes];
  }
  Microkernel<S> stream_kernel(int64_t rows, int64_t columns) const {
    return stream_kernels[(rows - 1) * (stream_columns / lanes) + (columns - 1) / lanes];
  }
};

// What a table needs; decode_features (dispatch.h) tells what there is.
enum Feature : unsigned {
  feature_avx2 = 1u << 0,    // and FMA, F16C
  feature_avx512 = 1u << 1,  // F, DQ, BW, VL
  feature_avx512_bf16 = 1u << 2,
};

struct KernelTable {
  const char* name;
  const char* description;
  unsigned needs;
  const Kernels<float>* float32;
  const Kernels<double>* float64;
  const Kernels<BFloat16>* bfloat16;
  const Kernels<Float16>* float16;
  // Records `name` for the calling thread, from inside the ISA's own file: tests prove by it that
  // the ISA that was asked for is the one that ran.
  void (*mark)();
};

template <class S> const Kernels<S>& kernels_of(const KernelTable& table);
template <> inline const Kernels<float>& kernels_of(const KernelTable& table) { return *table.float32; }
template <> inline const Kernels<double>& kernels_of(const KernelTable& table) { return *table.float64; }
template <> inline const Kernels<BFloat16>& kernels_of(const KernelTable& table) { return *table.bfloat16; }
template <> inline const Kernels<Float16>& kernels_of(const KernelTable& table) { return *table.float16; }

// Set by KernelTable::mark.
extern thread_local const char* last_isa;

}  // namespace fastmlp::cpu
