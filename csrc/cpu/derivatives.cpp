// What derivatives.h declares. The components of a block of rows are stacked, values first, so that a layer is one
// product for all that have no bias; a block goes through all layers before the next one begins, and so stays in a
// cache. Takes its scratch before it starts threads.
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

// What both directions know of a pass, and how they divide its rows.
template <class S> class Stacked {
 public:
  Stacked(const Network& network, const Directions& directions)
      : table(active()),
        kernels(kernels_of<S>(table)),
        network(network),
        directions(directions),
        count(directions.components()),
        rows(network.rows),
        width(widest(network, {0, network.layers.size(), true})),
        block(std::clamp<int64_t>(
            ceil_divide(block_rows<S>(network, {0, network.layers.size(), true}, rows * count), count), 1,
            std::max<int64_t>(rows, 1))),
        chunks(chunks_of_rows(rows * count)) {}

  // Calls run(rows, is_first) for each block of a chunk; once for a chunk without rows.
  template <class Run> void for_blocks(int64_t chunk, const Run& run) const {
    const Range range = part_of(rows, 1, chunk, chunks);
    const int64_t blocks = std::max<int64_t>(1, ceil_divide(range.size(), block));
    for (int64_t b = 0; b < blocks; b++) {
      const Range part = part_of(range.size(), 1, b, blocks);
      run(Range{range.begin + part.begin, range.begin + part.end}, b == 0);
    }
  }

  int threads_of(double passes, int threads) const {
    const double work = passes * double(count) * multiply_adds(network, {0, network.layers.size(), true}, rows);
    return int(std::min<int64_t>(useful_threads(work, threads), chunks));
  }

  // All components of the rows, one after the other, in so many features; vectors may be read past their end.
  S* take_components(Carver& carver, int64_t features) const {
    return carver.take<S>(count * block * features + kernels.lanes);
  }

  // Where what is kept of a block begins. Of each block it is layer after layer, so that it does not depend on how
  // many blocks there are.
  int64_t kept_at(Range range) const { return range.begin * count * kept_features(network); }

  // The components of the input itself: its derivative along an axis is 1 there, and all others are 0.
  void load_input(Range range, S* out) const {
    const int64_t m = range.size(), features = network.layers[0].in_features;
    copied(network.input, range, features, out);
    std::fill_n(out + m * features, (count - 1) * m * features, S(0));
    for (int i = 0; i < directions.firsts(); i++) {
      S* const seeds = out + (1 + i) * m * features + directions.axes[size_t(i)];
      for (int64_t row = 0; row < m; row++) seeds[row * features] = S(1);
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

  // A product of rows that lie one after the other with packed weights.
  RowProduct<S> by_panels(int64_t m, int64_t n, int64_t k, const S* a, const S* panels, S* output) const {
    RowProduct<S> p;
    p.m = m;
    p.n = n;
    p.k = k;
    p.a = a;
    p.a_step = k;
    p.a_k_step = 1;
    p.b = panels;
    p.b_panel = k * kernels.nr;
    p.b_step = kernels.nr;
    p.b_padded = true;
    p.output = output;
    p.output_step = n;
    return p;
  }

  const KernelTable& table;
  const Kernels<S>& kernels;
  const Network& network;
  const Directions& directions;
  const int64_t count, rows, width, block, chunks;
};

template <class S> class Forward : Stacked<S> {
 public:
  explicit Forward(const DerivativesForward& pass) : Stacked<S>(pass.network, pass.directions), pass(pass) {}

  void run(int threads) {
    threads = this->threads_of(1, threads);
    Carver measure, own_size;
    carve_shared(measure);
    carve_own(own_size);
    const Workspace workspace(measure.used() + size_t(threads) * own_size.used());
    Carver carver(workspace.data());
    carve_shared(carver);
    prepare();
    run_tasks(this->chunks, threads, [&](int64_t chunk, int slot) {
      Carver own(workspace.data() + measure.used() + size_t(slot) * own_size.used());
      this->table.mark();
      const Own memory = carve_own(own);
      this->for_blocks(chunk, [&](Range range, bool) { run_block(range, memory); });
    });
  }

 private:
  struct Packed {
    S *panels, *bias;  // bias null if there is none
  };
  struct Own {
    S *tile, *input;
    S* values[2];
  };

  void carve_shared(Carver& carver) {
    packed.clear();
    for (const Layer& layer : this->network.layers) {
      S* const panels = carver.take<S>(panels_size(this->kernels, layer.out_features, layer.in_features));
      S* const bias = layer.bias.data ? carver.take<S>(round_up(layer.out_features, this->kernels.nr)) : nullptr;
      packed.push_back({panels, bias});
    }
  }
  Own carve_own(Carver& carver) const {
    Own own;
    own.tile = carver.take<S>(this->kernels.mr * this->kernels.nr);
    own.input = this->take_components(carver, this->network.layers[0].in_features);
    for (S*& values : own.values) values = this->take_components(carver, this->width);
    return own;
  }

  void prepare() const {
    for (size_t l = 0; l < packed.size(); l++) {
      const Layer& layer = this->network.layers[l];
      pack_panels(this->kernels, layer.weight, layer.out_features, layer.in_features, true, packed[l].panels);
      const S* const bias = static_cast<const S*>(layer.bias.data);
      for (int64_t j = 0; bias && j < layer.out_features; j++) packed[l].bias[j] = bias[j * layer.bias.stride];
    }
  }

  void run_block(Range range, const Own& own) const {
    const int64_t m = range.size();
    this->load_input(range, own.input);
    const S* x = own.input;
    S* kept = pass.kept ? static_cast<S*>(pass.kept) + this->kept_at(range) : nullptr;
    for (size_t l = 0; l < packed.size(); l++) {
      const Layer& layer = this->network.layers[l];
      const bool keeps = kept && keeps_components(this->network, l);
      S* const output = own.values[l % 2];
      S* const pre = keeps ? kept : output;
      multiply(layer, packed[l], m, x, pre, own.tile);
      if (keeps) kept += this->count * m * layer.out_features;
      x = pre;
      if (layer.activation.kind == identity_kind) continue;
      this->activation(layer).forward(this->through(layer, m, pre, output, nullptr));
      x = output;
    }
    const int64_t outputs = this->network.layers.back().out_features;
    for (size_t c = 0; c < pass.outputs.size(); c++) {
      std::copy_n(x + int64_t(c) * m * outputs, m * outputs, static_cast<S*>(pass.outputs[c]) + range.begin * outputs);
    }
  }

  // Values have the bias; a derivative of it is 0.
  void multiply(const Layer& layer, const Packed& weights, int64_t m, const S* x, S* output, S* tile) const {
    const int64_t n = layer.out_features, k = layer.in_features;
    RowProduct<S> values = this->by_panels(m, n, k, x, weights.panels, output);
    values.bias = weights.bias;
    multiply_rows(this->kernels, values, tile);
    const int64_t others = (this->count - 1) * m;
    multiply_rows(this->kernels, this->by_panels(others, n, k, x + m * k, weights.panels, output + m * n), tile);
  }

  const DerivativesForward& pass;
  std::vector<Packed> packed;
};

template <class S> class Backward : Stacked<S> {
 public:
  explicit Backward(const DerivativesBackward& pass)
      : Stacked<S>(pass.pass.network, pass.directions),
        pass(pass),
        layers(pass.pass.network.layers.size()),
        lowest(lowest_layer(pass.pass)) {}

  void run(int threads) {
    if (lowest == layers) return;
    threads = this->threads_of(2, threads);
    GradientSums<S> sums(pass.pass, {0, layers, true}, this->chunks);
    Carver measure, own_size;
    carve_shared(measure);
    carve_own(own_size);
    const Workspace workspace(measure.used() + sums.bytes() + size_t(threads) * own_size.used());
    Carver carver(workspace.data());
    carve_shared(carver);
    sums.place(workspace.data() + measure.used());
    char* const owns = workspace.data() + measure.used() + sums.bytes();
    for (size_t l = 0; l < layers; l++) {
      const Layer& layer = this->network.layers[l];
      if (panels[l]) {
        pack_panels(this->kernels, layer.weight, layer.in_features, layer.out_features, false, panels[l]);
      }
    }
    run_tasks(this->chunks, threads, [&](int64_t chunk, int slot) {
      Carver own(owns + size_t(slot) * own_size.used());
      this->table.mark();
      const Own memory = carve_own(own);
      this->for_blocks(chunk,
                       [&](Range range, bool is_first) { run_block(range, !is_first, sums.of_chunk(chunk), memory); });
    });
    sums.add_up();
  }

 private:
  struct Own {
    S *tile, *input, *output;
    S* grad[2];
  };

  // Whether a gradient goes on to what is below a layer.
  bool goes_below(size_t l) const { return l > lowest || (l == 0 && pass.pass.grad_input); }

  void carve_shared(Carver& carver) {
    panels.clear();
    for (size_t l = 0; l < layers; l++) {
      const Layer& layer = this->network.layers[l];
      const int64_t size = panels_size(this->kernels, layer.in_features, layer.out_features);
      panels.push_back(goes_below(l) ? carver.take<S>(size) : nullptr);
    }
  }
  Own carve_own(Carver& carver) const {
    Own own;
    own.tile = carver.take<S>(this->kernels.mr * this->kernels.nr);
    own.input = this->take_components(carver, this->network.layers[0].in_features);
    own.output = this->take_components(carver, this->width);
    for (S*& grad : own.grad) grad = this->take_components(carver, this->width);
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
      const S* output = kept;
      if (l < lowest) {
        // Only the output is asked for.
        if (has_activation) this->activation(layer).forward(this->through(layer, m, kept, own.output, nullptr));
      } else {
        if (!is_last) multiply_rows(this->kernels, dgrad(l + 1, count * m, above, grad), own.tile);
        if (has_activation) this->activation(layer).backward(this->through(layer, m, kept, own.output, grad));
        if (sums[l].bias) this->kernels.column_sums(m, layer.out_features, grad, sums[l].bias, add);
      }
      if (has_activation) output = own.output;
      if (!is_last && sums[l + 1].weight) {
        multiply_rows(this->kernels, wgrad(l + 1, m, above, output, has_activation, sums[l + 1].weight, add), own.tile);
      }
      if (l < lowest) return;
    }
    if (sums[0].weight) {
      this->load_input(range, own.input);
      multiply_rows(this->kernels, wgrad(0, m, own.grad[0], own.input, true, sums[0].weight, add), own.tile);
    }
    if (!pass.pass.grad_input) return;
    // Only values depend on the input, which its derivatives do not.
    const int64_t features = this->network.layers[0].in_features;
    S* const output = static_cast<S*>(pass.pass.grad_input) + range.begin * features;
    multiply_rows(this->kernels, dgrad(0, m, own.grad[0], output), own.tile);
  }

  void load_grads(Range range, S* out) const {
    const int64_t outputs = this->network.layers.back().out_features, size = range.size() * outputs;
    for (const Matrix& grad : pass.grads) {
      if (grad.data) {
        copied(grad, range, outputs, out);
      } else {
        std::fill_n(out, size, S(0));
      }
      out += size;
    }
  }

  // grad_weight (+)= grad^T input, over all components.
  RowProduct<S> wgrad(size_t l, int64_t m, const S* grad, const S* input, bool is_padded, S* sum, bool add) const {
    const Layer& layer = this->network.layers[l];
    RowProduct<S> p;
    p.m = layer.out_features;
    p.n = layer.in_features;
    p.k = this->count * m;
    p.a = grad;
    p.a_step = 1;
    p.a_k_step = layer.out_features;
    p.b = input;
    p.b_panel = this->kernels.nr;
    p.b_step = layer.in_features;
    p.b_padded = is_padded;
    p.output = sum;
    p.output_step = layer.in_features;
    p.sums = true;
    p.add = add;
    return p;
  }

  // output = grad weight, for `m` rows of the components.
  RowProduct<S> dgrad(size_t l, int64_t m, const S* grad, S* output) const {
    const Layer& layer = this->network.layers[l];
    return this->by_panels(m, layer.in_features, layer.out_features, grad, panels[l], output);
  }

  const DerivativesBackward& pass;
  const size_t layers, lowest;
  std::vector<S*> panels;  // packed weights of each layer; null where no gradient goes through
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
