// What derivatives.h declares. A block of points goes through all layers before the next one begins, and so stays in a
// cache. Within a block components follow each other, and each holds a row of points for each feature: vectors run
// along points, of which there are enough to fill them, while a layer may have 50 features, or one. Products then read
// weights where they lie. Takes its scratch before it starts threads.
#include "derivatives.h"

#include <algorithm>
#include <vector>

#include "../contract/activation_info.h"
#include "../contract/shape.h"
#include "dispatch.h"
#include "gradient_sums.h"
#include "parallel.h"
#include "row_product.h"
#include "row_shape.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// Points of a block are a multiple of so many bytes, which fill the widest register tile.
constexpr int64_t unit_bytes = 128;
// What all components of a block may take in its widest layer.
constexpr int64_t component_bytes = 32 << 10;

// What both directions know of a pass, and how they divide its points.
template <class S> class Blocks {
 public:
  Blocks(const Network& network, const Directions& directions)
      : table(active()),
        kernels(kernels_of<S>(table)),
        network(network),
        directions(directions),
        count(directions.components()),
        points(network.rows),
        width(std::max<int64_t>(1, widest(network, {0, network.layers.size(), true}))),
        block(unit * std::max<int64_t>(1, component_bytes / (unit_bytes * count * width))),
        chunks(chunks_of_rows(points * count)) {}

  // Calls run(points, is_first) for each block of a chunk; once for a chunk without points.
  template <class Run> void for_blocks(int64_t chunk, const Run& run) const {
    const Range range = part_of(points, unit, chunk, chunks);
    int64_t begin = range.begin;
    do {
      const int64_t end = std::min(begin + block, range.end);
      run(Range{begin, end}, begin == range.begin);
      begin = end;
    } while (begin < range.end);
  }

  int threads_of(double passes, int threads) const {
    const double work = passes * double(count) * multiply_adds(network, {0, network.layers.size(), true}, points);
    return int(std::min<int64_t>(useful_threads(work, threads), chunks));
  }

  // All components of a block in so many features; vectors may be read past their end.
  S* take_components(Carver& carver, int64_t features) const {
    return carver.take<S>(count * block * features + kernels.lanes);
  }
  S* take_tile(Carver& carver) const { return carver.take<S>(kernels.mr * kernels.nr); }

  // Where what is kept of a block begins: layer after layer, so that it does not depend on how many blocks there are.
  int64_t kept_at(Range range) const { return range.begin * count * kept_features(network); }

  // The components of the input itself: its derivative along an axis is 1 there, and all others are 0.
  void load_input(Range range, S* out) const {
    const int64_t m = range.size(), features = network.layers[0].in_features;
    load(network.input, range, features, out);
    std::fill_n(out + m * features, (count - 1) * m * features, S(0));
    for (int i = 0; i < directions.firsts(); i++) {
      std::fill_n(out + ((1 + i) * features + directions.axes[size_t(i)]) * m, m, S(1));
    }
  }

  // Some rows of a matrix, as a row of points for each column; and back.
  static void load(const Matrix& x, Range range, int64_t columns, S* out) {
    for (int64_t j = 0; j < columns; j++) {
      const S* const column = static_cast<const S*>(x.data) + j * x.column_stride;
      for (int64_t i = range.begin; i < range.end; i++) *out++ = column[i * x.row_stride];
    }
  }
  static void store(const S* x, Range range, int64_t columns, S* out) {
    for (int64_t j = 0; j < columns; j++) {
      for (int64_t i = range.begin; i < range.end; i++) out[i * columns + j] = *x++;
    }
  }

  Components<S> through(const Layer& layer, int64_t m, const S* pre, S* output, S* grad) const {
    Components<S> all;
    all.n = all.step = m * layer.out_features;
    all.firsts = directions.firsts();
    all.seconds = directions.seconds();
    all.pairs = directions.pairs.data();
    all.pairs_end = directions.pairs_end.data();
    all.pre = pre;
    all.output = output;
    all.grad = grad;
    all.scalars = layer.activation.scalars;
    return all;
  }
  const ComponentKernels<S>& activation(const Layer& layer) const { return kernels.components[layer.activation.kind]; }

  // output (+)= weight input, for m points of one component. `weight` may be transposed.
  RowProduct<S> product(const Matrix& weight, int64_t rows, int64_t k, int64_t m, const S* input, S* output) const {
    RowProduct<S> p;
    p.m = rows;
    p.n = m;
    p.k = k;
    p.a = static_cast<const S*>(weight.data);
    p.a_step = weight.row_stride;
    p.a_k_step = weight.column_stride;
    p.b = input;
    p.b_panel = kernels.nr;
    p.b_step = m;
    p.b_padded = false;
    p.output = output;
    p.output_step = m;
    return p;
  }

  const KernelTable& table;
  const Kernels<S>& kernels;
  const Network& network;
  const Directions& directions;
  const int64_t count, points, width, block, chunks;

 private:
  static constexpr int64_t unit = unit_bytes / int64_t(sizeof(S));
};

template <class S> class Forward : Blocks<S> {
 public:
  explicit Forward(const DerivativesForward& pass) : Blocks<S>(pass.network, pass.directions), pass(pass) {}

  void run(int threads) const {
    threads = this->threads_of(1, threads);
    Carver own_size;
    carve(own_size);
    const Workspace workspace(size_t(threads) * own_size.used());
    run_tasks(this->chunks, threads, [&](int64_t chunk, int slot) {
      Carver carver(workspace.data() + size_t(slot) * own_size.used());
      this->table.mark();
      const Own own = carve(carver);
      this->for_blocks(chunk, [&](Range range, bool) { run_block(range, own); });
    });
  }

 private:
  struct Own {
    S *tile, *input;
    S* values[2];
  };

  Own carve(Carver& carver) const {
    Own own;
    own.tile = this->take_tile(carver);
    own.input = this->take_components(carver, this->network.layers[0].in_features);
    for (S*& values : own.values) values = this->take_components(carver, this->width);
    return own;
  }

  void run_block(Range range, const Own& own) const {
    const int64_t m = range.size();
    this->load_input(range, own.input);
    const S* x = own.input;
    S* kept = pass.kept ? static_cast<S*>(pass.kept) + this->kept_at(range) : nullptr;
    for (size_t l = 0; l < this->network.layers.size(); l++) {
      const Layer& layer = this->network.layers[l];
      const bool keeps = kept && keeps_components(this->network, l);
      S* const output = own.values[l % 2];
      S* const pre = keeps ? kept : output;
      multiply(layer, m, x, pre, own.tile);
      if (keeps) kept += this->count * m * layer.out_features;
      x = pre;
      if (layer.activation.kind == identity_kind) continue;
      this->activation(layer).forward(this->through(layer, m, pre, output, nullptr));
      x = output;
    }
    const int64_t outputs = this->network.layers.back().out_features;
    for (size_t c = 0; c < pass.outputs.size(); c++) {
      this->store(x + int64_t(c) * m * outputs, range, outputs, static_cast<S*>(pass.outputs[c]));
    }
  }

  // Products are added to the bias, which the values have; the derivatives of it are 0.
  void multiply(const Layer& layer, int64_t m, const S* x, S* output, S* tile) const {
    const int64_t n = layer.out_features, k = layer.in_features;
    const S* const bias = static_cast<const S*>(layer.bias.data);
    for (int64_t c = 0; c < this->count; c++) {
      RowProduct<S> p = this->product(layer.weight, n, k, m, x + c * m * k, output + c * m * n);
      if (c == 0 && bias) {
        for (int64_t j = 0; j < n; j++) std::fill_n(output + j * m, m, bias[j * layer.bias.stride]);
        p.sums = p.add = true;
      }
      multiply_rows(this->kernels, p, tile);
    }
  }

  const DerivativesForward& pass;
};

template <class S> class Backward : Blocks<S> {
 public:
  explicit Backward(const DerivativesBackward& pass)
      : Blocks<S>(pass.pass.network, pass.directions),
        pass(pass),
        layers(pass.pass.network.layers.size()),
        lowest(lowest_layer(pass.pass)) {}

  void run(int threads) const {
    if (lowest == layers) return;
    threads = this->threads_of(2, threads);
    GradientSums<S> sums(pass.pass, {0, layers, true}, this->chunks);
    Carver own_size;
    carve(own_size);
    const Workspace workspace(sums.bytes() + size_t(threads) * own_size.used());
    sums.place(workspace.data());
    run_tasks(this->chunks, threads, [&](int64_t chunk, int slot) {
      Carver carver(workspace.data() + sums.bytes() + size_t(slot) * own_size.used());
      this->table.mark();
      const Own own = carve(carver);
      this->for_blocks(chunk,
                       [&](Range range, bool is_first) { run_block(range, !is_first, sums.of_chunk(chunk), own); });
    });
    sums.add_up();
  }

 private:
  struct Own {
    S *tile, *input, *output, *panels;
    S* grad[2];
    double* bias;
  };

  Own carve(Carver& carver) const {
    Own own;
    own.tile = this->take_tile(carver);
    own.input = this->take_components(carver, this->network.layers[0].in_features);
    own.output = this->take_components(carver, this->width);
    own.panels = carver.take<S>(panels_size(this->kernels, this->width, this->block));
    for (S*& grad : own.grad) grad = this->take_components(carver, this->width);
    own.bias = carver.take<double>(this->width);
    return own;
  }

  // Takes the block's gradients down through the layers. What lies before an activation is read once, for the gradient
  // and for the layer's output, which is the input of the layer above.
  void run_block(Range range, bool add, const std::vector<LayerSums<S>>& sums, const Own& own) const {
    const int64_t m = range.size(), count = this->count;
    const S* kept = static_cast<const S*>(pass.kept) + this->kept_at(range) + count * m * kept_features(this->network);
    load_grads(range, own.grad[(layers - 1) % 2]);
    for (size_t l = layers; l-- > 0;) {
      const Layer& layer = this->network.layers[l];
      const bool is_last = l + 1 == layers, has_activation = layer.activation.kind != identity_kind;
      S* const grad = own.grad[l % 2];
      const S* const above = own.grad[(l + 1) % 2];
      if (keeps_components(this->network, l)) kept -= count * m * layer.out_features;
      if (l < lowest) {
        // Only the output is asked for.
        if (has_activation) this->activation(layer).forward(this->through(layer, m, kept, own.output, nullptr));
      } else {
        if (!is_last) multiply_down(this->network.layers[l + 1], count, m, above, grad, own.tile);
        if (has_activation) this->activation(layer).backward(this->through(layer, m, kept, own.output, grad));
        if (sums[l].bias) add_rows(layer.out_features, m, grad, sums[l].bias, add, own.bias);
      }
      if (!is_last) add_weights(l + 1, m, above, has_activation ? own.output : kept, sums[l + 1].weight, add, own);
      if (l < lowest) return;
    }
    if (sums[0].weight) {
      this->load_input(range, own.input);
      add_weights(0, m, own.grad[0], own.input, sums[0].weight, add, own);
    }
    if (!pass.pass.grad_input) return;
    // Only values depend on the input, which its derivatives do not.
    multiply_down(this->network.layers[0], 1, m, own.grad[0], own.output, own.tile);
    const int64_t features = this->network.layers[0].in_features;
    this->store(own.output, range, features, static_cast<S*>(pass.pass.grad_input));
  }

  void load_grads(Range range, S* out) const {
    const int64_t outputs = this->network.layers.back().out_features, size = range.size() * outputs;
    for (const Matrix& grad : pass.grads) {
      if (grad.data) {
        this->load(grad, range, outputs, out);
      } else {
        std::fill_n(out, size, S(0));
      }
      out += size;
    }
  }

  // output = weight^T grad, for some components.
  void multiply_down(const Layer& layer, int64_t components, int64_t m, const S* grad, S* output, S* tile) const {
    const int64_t n = layer.in_features, k = layer.out_features;
    const Matrix transposed{layer.weight.data, layer.weight.column_stride, layer.weight.row_stride};
    for (int64_t c = 0; c < components; c++) {
      multiply_rows(this->kernels, this->product(transposed, n, k, m, grad + c * m * k, output + c * m * n), tile);
    }
  }

  // sum (+)= grad input^T, over all components. Products run along the layer's inputs. Those that would leave most
  // lanes of a vector empty are inner products along points, and so is all where there is but one output.
  void add_weights(size_t l, int64_t m, const S* grad, const S* input, S* sum, bool add, const Own& own) const {
    if (!sum) return;
    const Layer& layer = this->network.layers[l];
    const Kernels<S>& kernels = this->kernels;
    const int64_t rows = layer.out_features, n = layer.in_features, rest = n % kernels.lanes;
    const int64_t by_dots = rows == 1 ? n : 4 * rest <= kernels.lanes ? rest : 0;
    RowProduct<S> p = this->product({nullptr, m, 1}, rows, m, n, own.panels, sum);
    p.n = n - by_dots;
    p.b_panel = kernels.nr * m;
    p.b_step = kernels.nr;
    p.b_padded = p.sums = true;
    for (int64_t c = 0; c < this->count; c++, grad += m * rows, input += m * n) {
      p.a = grad;
      p.add = add || c > 0;
      if (rows == 1) {
        kernels.dot_tile(n, 1, m, input, m, grad, m, sum, 1, p.add);
        continue;
      }
      pack_panels(kernels, {const_cast<S*>(input), m, 1}, p.n, m, true, own.panels);
      multiply_rows(kernels, p, own.tile);
      kernels.dot_tile(rows, by_dots, m, grad, m, input + p.n * m, m, sum + p.n, n, p.add);
    }
  }

  // sum[j] (+)= the sum of row j.
  void add_rows(int64_t rows, int64_t m, const S* grad, S* sum, bool add, double* totals) const {
    std::fill_n(totals, rows, 0.0);
    this->kernels.element_folds[0].rows(rows, m, grad, totals);
    for (int64_t j = 0; j < rows; j++) sum[j] = add ? S(sum[j] + S(totals[j])) : S(totals[j]);
  }

  const DerivativesBackward& pass;
  const size_t layers, lowest;
};

template <class F> void with_dtype(DType dtype, const F& f) { dtype == DType::float64 ? f(double{}) : f(float{}); }

}  // namespace

void derivatives(const DerivativesForward& pass, int threads) {
  if (pass.network.rows == 0) return;
  with_dtype(pass.network.dtype, [&](auto storage) { Forward<decltype(storage)>(pass).run(threads); });
}

void derivatives_backward(const DerivativesBackward& pass, int threads) {
  with_dtype(pass.pass.network.dtype, [&](auto storage) { Backward<decltype(storage)>(pass).run(threads); });
}

}  // namespace fastmlp::cpu
