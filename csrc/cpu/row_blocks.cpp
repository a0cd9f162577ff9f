// The loops of row_blocks.h. Baseline code; arithmetic is behind the table.
//
// Activations are row-major in memory and never packed: the row kernels read A where it is. For the forward product
// weights are packed once per call; dgrad reads them as they are, and wgrad reads saved outputs as they are.
#include "row_blocks.h"

#include <algorithm>

#include "../activation_info.h"
#include "gemm.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// Weights of layers that go together, beside a block of rows in the L2 cache.
constexpr int64_t layer_bytes = 128 << 10, group_bytes = 256 << 10, most_features = 2048;
// What a block of rows may take in each of its layers.
constexpr int64_t block_bytes = 32 << 10;
constexpr int64_t fewest_rows = 56, most_rows = 192;
// A block of B that is read again for each tile of rows comes from the L1 cache.
constexpr int64_t near_bytes = 20 << 10;

template <class S> bool is_narrow(const Layer& layer) {
  const int64_t bytes = layer.in_features * layer.out_features * int64_t(sizeof(S));
  return in_itself<S> && bytes <= layer_bytes && std::max(layer.in_features, layer.out_features) <= most_features;
}

// C = act(A B + bias), or C += A B, where B has `n` columns in panels of NR.
template <class S> struct RowProduct {
  int64_t m, n, k;
  const S* a;
  int64_t a_step, a_k_step;  // from one row of A to the next, and along k
  const S* b;
  int64_t b_panel, b_step;  // from one panel of B to the next, and along k
  bool b_padded;
  S* output;
  int64_t output_step;
  S* pre_activation = nullptr;  // like output
  const S* bias = nullptr;      // padded to a vector
  ActivationSpec activation;
  // Memory that nobody has touched yet, gapless: its lines are asked for a tile ahead.
  bool fresh_a = false, fresh_output = false;
  bool sums = false, add = false;  // the output is a sum: of this product alone, or added to
};

template <class S>
void multiply_tile(const Kernels<S>& kernels, const RowProduct<S>& p, S* scratch, Range rows, int64_t panel) {
  const int64_t column = panel * kernels.nr;
  const int64_t at = rows.begin * p.output_step + column;
  const bool simple = p.activation.kind == identity_kind || p.activation.kind == relu_kind;
  const bool complete = simple && !p.pre_activation && !p.sums;
  Tile<S> t;
  t.columns = std::min(kernels.nr, p.n - column);
  t.a_step = p.a_step;
  t.a_k_step = p.a_k_step;
  t.b_step = p.b_step;
  t.b_padded = p.b_padded;
  // One line with each k.
  const int64_t asked = panel * p.k * (line_bytes / int64_t(sizeof(S)));
  const auto ahead = [&](bool fresh, const S* data, int64_t step) {
    const int64_t next = rows.end * step + asked;
    return fresh && next < p.m * step ? data + next : nullptr;
  };
  t.input_ahead = ahead(p.fresh_a, p.a, p.a_step);
  t.output_ahead = ahead(p.fresh_output, p.output, p.output_step);
  t.sums = p.sums ? p.output + at : scratch;
  t.sums_step = p.sums ? p.output_step : kernels.nr;
  t.output = nullptr;
  t.leading_dimension = p.output_step;
  t.bias = p.bias ? p.bias + column : nullptr;
  t.relu = p.activation.kind == relu_kind;
  const auto kernel = kernels.row_kernel(rows.size(), t.columns);
  // Chains of equal length: the longest one sets the error.
  const int64_t step = ceil_divide(p.k, std::max<int64_t>(1, ceil_divide(p.k, kernels.chain)));
  int64_t from = 0;
  do {
    t.k = std::min(step, p.k - from);
    t.a = p.a + rows.begin * p.a_step + from * p.a_k_step;
    t.b = p.b + panel * p.b_panel + from * p.b_step;
    t.add = from > 0 || p.add;
    from += t.k;
    if (from >= p.k && complete) t.output = p.output + at;
    kernel(t);
  } while (from < p.k);
  if (complete || p.sums) return;
  Epilogue<S> e;
  e.tile = scratch;
  e.tile_step = kernels.nr;
  e.rows = rows.size();
  e.columns = t.columns;
  e.sums = nullptr;
  e.sums_step = 0;
  e.output = p.output + at;
  e.pre_activation = p.pre_activation ? p.pre_activation + at : nullptr;
  e.leading_dimension = p.output_step;
  e.bias = t.bias;
  e.scalars = p.activation.scalars;
  kernels.activations[p.activation.kind].epilogue(e);
}

// `scratch` holds a tile.
template <class S> void multiply_rows(const Kernels<S>& kernels, const RowProduct<S>& p, S* scratch) {
  // Tiles of equal height: a short last one would leave registers empty.
  const int64_t tiles = ceil_divide(p.m, kernels.mr), panels = ceil_divide(p.n, kernels.nr);
  if (p.k * p.n * int64_t(sizeof(S)) <= near_bytes) {
    for (int64_t i = 0; i < tiles; i++) {
      for (int64_t j = 0; j < panels; j++) multiply_tile(kernels, p, scratch, part_of(p.m, 1, i, tiles), j);
    }
  } else {
    for (int64_t j = 0; j < panels; j++) {
      for (int64_t i = 0; i < tiles; i++) multiply_tile(kernels, p, scratch, part_of(p.m, 1, i, tiles), j);
    }
  }
}

// Panels of B from a matrix of k rows or, as `transposed`, k columns.
template <class S>
void pack_panels(const Kernels<S>& kernels, const Matrix& x, int64_t n, int64_t k, bool transposed, S* panels) {
  const int64_t stride = transposed ? x.row_stride : x.column_stride;
  const int64_t k_stride = transposed ? x.column_stride : x.row_stride;
  for (int64_t j = 0; j < n; j += kernels.nr) {
    kernels.pack_b(static_cast<const S*>(x.data) + j * stride, stride, k_stride, std::min(kernels.nr, n - j), k,
                   panels + j * k);
  }
}

template <class S> int64_t panels_size(const Kernels<S>& kernels, int64_t n, int64_t k) {
  return round_up(n, kernels.nr) * k;
}

int64_t widest(const Network& network, const Layers& layers) {
  int64_t width = network.layers[layers.first].in_features;
  for (size_t l = layers.first; l < layers.end; l++) width = std::max(width, network.layers[l].out_features);
  return width;
}

double multiply_adds(const Network& network, const Layers& layers, int64_t rows) {
  double weights = 0;
  for (size_t l = layers.first; l < layers.end; l++) {
    const Layer& layer = network.layers[l];
    weights += double(layer.in_features) * double(layer.out_features + 16);  // reading and writing take time too
  }
  return weights * double(rows);
}

template <class S> int64_t block_rows(const Network& network, const Layers& layers, int64_t rows) {
  const int64_t width = std::max<int64_t>(1, widest(network, layers));
  const int64_t most = std::clamp(block_bytes / (width * int64_t(sizeof(S))), fewest_rows, most_rows);
  return std::clamp<int64_t>(rows, 1, most);
}

// The row kernels read rows without gaps between their elements. And rows that lie a multiple of 4096 bytes apart
// would fall into the same few lines of an L1 cache.
template <class S> bool must_be_copied(const Matrix& x) {
  return x.column_stride != 1 || (x.row_stride != 0 && x.row_stride * int64_t(sizeof(S)) % 4096 == 0);
}

bool is_gapless(const Matrix& x, int64_t rows, int64_t columns) {
  return (columns <= 1 || x.column_stride == 1) && (rows <= 1 || x.row_stride == columns);
}

// A block of rows without gaps.
template <class S> Matrix copied(const Matrix& x, Range rows, int64_t columns, S* buffer) {
  S* out = buffer;
  for (int64_t i = rows.begin; i < rows.end; i++) {
    const S* row = static_cast<const S*>(x.data) + i * x.row_stride;
    for (int64_t j = 0; j < columns; j++) *out++ = row[j * x.column_stride];
  }
  return {buffer, columns, 1};
}

template <class S> class Forward {
 public:
  Forward(const KernelTable& table, const Network& network, const Layers& layers, const Matrix& input, int64_t rows,
          const Place<S>* places)
      : table(table),
        kernels(kernels_of<S>(table)),
        network(network),
        layers(layers),
        input(input),
        rows(rows),
        places(places),
        width(widest(network, layers)),
        block(block_rows<S>(network, layers, rows)),
        copies_input(must_be_copied<S>(input)) {
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const bool in_place = layer.weight.column_stride == 1;
      const bool dots = in_place && goes_by_dots(kernels, rows, layer.out_features, layer.in_features, true, true);
      steps.push_back({dots, nullptr, nullptr});
    }
  }

  void run(int threads) {
    Carver measure;
    carve_shared(measure);
    Carver own;
    carve_own(own);
    const int64_t blocks = ceil_divide(rows, block);
    threads = int(std::min<int64_t>(useful_threads(multiply_adds(network, layers, rows), threads), blocks));
    const Workspace workspace(measure.used() + size_t(threads) * own.used());
    Carver shared(workspace.data());
    carve_shared(shared);
    prepare();
    run_tasks(blocks, threads, [&](int64_t b, int slot) {
      Carver carver(workspace.data() + measure.used() + size_t(slot) * own.used());
      table.mark();
      run_block(part_of(rows, 1, b, blocks), carve_own(carver));
    });
  }

 private:
  struct Step {
    bool dots;
    S* panels;
    S* bias;
  };
  struct Own {
    S *tile, *dot_bias, *input;
    S* hidden[2];
  };

  void carve_shared(Carver& carver) {
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      Step& step = steps[l - layers.first];
      if (step.dots) continue;
      step.panels = carver.take<S>(panels_size(kernels, layer.out_features, layer.in_features));
      step.bias = layer.bias.data ? carver.take<S>(round_up(layer.out_features, kernels.nr)) : nullptr;
    }
  }
  Own carve_own(Carver& carver) const {
    Own own;
    own.tile = carver.take<S>(kernels.mr * kernels.nr);
    own.dot_bias = carver.take<S>(dot_bias_size(kernels));
    own.input = copies_input ? carver.take<S>(block * network.layers[layers.first].in_features) : nullptr;
    for (S*& hidden : own.hidden) hidden = layers.end - layers.first > 1 ? carver.take<S>(block * width) : nullptr;
    return own;
  }

  void prepare() {
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const Step& step = steps[l - layers.first];
      if (step.dots) continue;
      pack_panels(kernels, layer.weight, layer.out_features, layer.in_features, true, step.panels);
      const S* bias = static_cast<const S*>(layer.bias.data);
      for (int64_t j = 0; bias && j < layer.out_features; j++) step.bias[j] = bias[j * layer.bias.stride];
    }
  }

  void run_block(Range range, const Own& own) const {
    Matrix x = input;
    x.data = static_cast<S*>(input.data) + range.begin * input.row_stride;
    if (copies_input) x = copied(input, range, network.layers[layers.first].in_features, own.input);
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const auto here = [&](S* place) { return place ? place + range.begin * layer.out_features : nullptr; };
      S* const kept = here(places[l].output);
      S* const output = kept ? kept : own.hidden[l % 2];
      run_layer(layer, steps[l - layers.first], range.size(), x, output, kept != nullptr,
                here(places[l].pre_activation), own);
      x = {output, layer.out_features, 1};
    }
  }

  void run_layer(const Layer& layer, const Step& step, int64_t m, const Matrix& x, S* output, bool kept,
                 S* pre_activation, const Own& own) const {
    if (step.dots) {
      Product<S> p;
      set_forward(p, layer, m, x, output, pre_activation);
      return multiply_by_dots(kernels, p, {0, m}, {0, p.n}, p.a, p.b, own.tile, own.dot_bias);
    }
    RowProduct<S> p;
    p.m = m;
    p.n = layer.out_features;
    p.k = layer.in_features;
    p.a = static_cast<const S*>(x.data);
    p.a_step = x.row_stride;
    p.a_k_step = 1;
    p.b = step.panels;
    p.b_panel = layer.in_features * kernels.nr;
    p.b_step = kernels.nr;
    p.b_padded = true;
    p.output = output;
    p.output_step = layer.out_features;
    p.pre_activation = pre_activation;
    p.bias = step.bias;
    p.fresh_a = &layer == &network.layers[layers.first] && x.row_stride == layer.in_features;
    p.fresh_output = kept;
    p.activation = layer.activation;
    multiply_rows(kernels, p, own.tile);
  }

  const KernelTable& table;
  const Kernels<S>& kernels;
  const Network& network;
  const Layers layers;
  const Matrix input;
  const int64_t rows;
  const Place<S>* const places;
  const int64_t width, block;
  const bool copies_input;
  std::vector<Step> steps;  // one a layer
};

template <class S> class Backward {
 public:
  Backward(const KernelTable& table, const BackwardPass& pass, const Layers& layers, const Matrix& grad_output,
           S* grad_input)
      : table(table),
        kernels(kernels_of<S>(table)),
        pass(pass),
        network(pass.network),
        layers(layers),
        grad_output(grad_output),
        grad_input(grad_input),
        rows(network.rows),
        width(widest(network, layers)),
        block(block_rows<S>(network, layers, rows)),
        chunks(chunks_of_rows(rows)),
        copies_input(layers.first == 0 && must_be_copied<S>(network.input)),
        copies_grad(!is_gapless(grad_output, rows, network.layers[layers.end - 1].out_features)) {}

  void run(int threads) {
    Carver shared_size, own_size, share_size;
    carve_shared(shared_size);
    carve_own(own_size);
    carve_sums(share_size);
    const size_t share = chunks > 1 ? share_size.used() : 0;
    threads = int(std::min<int64_t>(useful_threads(2 * multiply_adds(network, layers, rows), threads), chunks));
    const Workspace workspace(shared_size.used() + size_t(chunks) * share + size_t(threads) * own_size.used());
    Carver carver(workspace.data());
    const Shared shared = carve_shared(carver);
    char* const shares = workspace.data() + shared_size.used();
    char* const owns = shares + size_t(chunks) * share;
    std::vector<Sums> sums;  // of each chunk; here, since threads must not allocate
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      Carver share_carver(shares + size_t(chunk) * share);
      sums.push_back(chunks > 1 ? carve_sums(share_carver) : results());
    }
    pack_weights(shared);
    run_tasks(chunks, threads, [&](int64_t chunk, int slot) {
      Carver own_carver(owns + size_t(slot) * own_size.used());
      const Own own = carve_own(own_carver);
      table.mark();
      run_chunk(part_of(rows, 1, chunk, chunks), shared, own, sums[size_t(chunk)]);
    });
    if (chunks > 1) reduce(shares, share);
  }

 private:
  // Gradients of one layer, over some of the rows.
  struct Sum {
    S* weight = nullptr;
    S* bias = nullptr;
  };
  using Sums = std::vector<Sum>;
  using Shared = std::vector<S*>;  // packed weights of each layer; null where they are read as they are
  struct Own {
    S *tile, *layer_input;
    S* grad[2];
  };

  bool in_place(size_t l) const { return network.layers[l].weight.column_stride == 1; }
  bool needs_dgrad(size_t l) const { return l > layers.first || grad_input; }

  Shared carve_shared(Carver& carver) const {
    Shared shared;
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const bool packed = needs_dgrad(l) && !in_place(l);
      const int64_t size = panels_size(kernels, layer.in_features, layer.out_features);
      shared.push_back(packed ? carver.take<S>(size) : nullptr);
    }
    return shared;
  }
  Own carve_own(Carver& carver) const {
    Own own;
    own.tile = carver.take<S>(kernels.mr * kernels.nr);
    own.layer_input = carver.take<S>(block * width);
    for (S*& grad : own.grad) grad = carver.take<S>(block * width);
    return own;
  }
  Sums carve_sums(Carver& carver) const {
    Sums sums;
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      Sum& sum = sums.emplace_back();
      if (pass.grad_weights[l]) sum.weight = carver.take<S>(layer.in_features * layer.out_features);
      if (pass.grad_biases[l]) sum.bias = carver.take<S>(layer.out_features);
    }
    return sums;
  }
  Sums results() const {
    Sums sums;
    for (size_t l = layers.first; l < layers.end; l++) {
      sums.push_back({static_cast<S*>(pass.grad_weights[l]), static_cast<S*>(pass.grad_biases[l])});
    }
    return sums;
  }

  void pack_weights(const Shared& shared) const {
    for (size_t l = layers.first; l < layers.end; l++) {
      S* const panels = shared[l - layers.first];
      const Layer& layer = network.layers[l];
      if (panels) pack_panels(kernels, layer.weight, layer.in_features, layer.out_features, false, panels);
    }
  }

  void reduce(char* shares, size_t share) const {
    add_chunks(reinterpret_cast<S*>(shares), chunks, int64_t(share / sizeof(S)));
    Carver carver(shares);
    const Sums total = carve_sums(carver), to = results();
    for (size_t i = 0; i < to.size(); i++) {
      const Layer& layer = network.layers[layers.first + i];
      if (to[i].weight) std::copy_n(total[i].weight, layer.in_features * layer.out_features, to[i].weight);
      if (to[i].bias) std::copy_n(total[i].bias, layer.out_features, to[i].bias);
    }
  }

  void run_chunk(Range chunk, const Shared& shared, const Own& own, const Sums& sums) const {
    const int64_t blocks = std::max<int64_t>(1, ceil_divide(chunk.size(), block));
    for (int64_t b = 0; b < blocks; b++) {
      const Range part = part_of(chunk.size(), 1, b, blocks);
      run_block({chunk.begin + part.begin, chunk.begin + part.end}, b > 0, shared, own, sums);
    }
  }

  // Adds the block's share to the sums, or begins them with it.
  void run_block(Range range, bool add, const Shared& shared, const Own& own, const Sums& sums) const {
    const int64_t m = range.size();
    const size_t last = layers.end - 1;
    const int64_t outputs = network.layers[last].out_features;
    const S* grad = static_cast<const S*>(grad_output.data) + range.begin * outputs;
    if (copies_grad) grad = static_cast<const S*>(copied(grad_output, range, outputs, own.grad[last % 2]).data);
    for (size_t l = layers.end; l-- > layers.first;) {
      const Layer& layer = network.layers[l];
      S* const own_grad = own.grad[l % 2];
      if (layer.activation.kind != identity_kind) {
        kernels.activations[layer.activation.kind].gradient(m * layer.out_features, grad, saved(l, range.begin),
                                                            own_grad, layer.activation.scalars);
        grad = own_grad;
      }
      const Sum& sum = sums[l - layers.first];
      if (sum.bias) kernels.column_sums(m, layer.out_features, grad, sum.bias, add);
      if (sum.weight) multiply_rows(kernels, wgrad(l, range, grad, own, sum.weight, add), own.tile);
      if (!needs_dgrad(l)) break;
      S* const output = l == layers.first ? grad_input + range.begin * layer.in_features : own.grad[(l + 1) % 2];
      multiply_rows(kernels, dgrad(l, m, grad, shared[l - layers.first], output), own.tile);
      grad = output;
    }
  }

  const S* saved(size_t l, int64_t row) const {
    return static_cast<const S*>(pass.saved[l].data) + row * network.layers[l].out_features;
  }

  RowProduct<S> wgrad(size_t l, Range range, const S* grad, const Own& own, S* sum, bool add) const {
    const Layer& layer = network.layers[l];
    RowProduct<S> p;
    p.m = layer.out_features;
    p.n = layer.in_features;
    p.k = range.size();
    p.a = grad;
    p.a_step = 1;
    p.a_k_step = layer.out_features;
    p.b_step = layer.in_features;
    if (l == 0) {
      Matrix x = network.input;
      x.data = static_cast<S*>(x.data) + range.begin * x.row_stride;
      if (copies_input) x = copied(network.input, range, layer.in_features, own.layer_input);
      p.b = static_cast<const S*>(x.data);
      p.b_step = x.row_stride;
    } else if (keeps_output(network.layers[l - 1].activation)) {
      p.b = saved(l - 1, range.begin);
    } else {
      const ActivationSpec& below = network.layers[l - 1].activation;
      kernels.activations[below.kind].value(p.k * p.n, saved(l - 1, range.begin), own.layer_input, below.scalars);
      p.b = own.layer_input;
    }
    p.b_panel = kernels.nr;
    p.b_padded = false;
    p.output = sum;
    p.output_step = layer.in_features;
    p.sums = true;
    p.add = add;
    return p;
  }

  RowProduct<S> dgrad(size_t l, int64_t m, const S* grad, const S* panels, S* output) const {
    const Layer& layer = network.layers[l];
    RowProduct<S> p;
    p.m = m;
    p.n = layer.in_features;
    p.k = layer.out_features;
    p.a = grad;
    p.a_step = layer.out_features;
    p.a_k_step = 1;
    p.b = panels ? panels : static_cast<const S*>(layer.weight.data);
    p.b_panel = panels ? layer.out_features * kernels.nr : kernels.nr;
    p.b_step = panels ? kernels.nr : layer.weight.row_stride;
    p.b_padded = panels != nullptr;
    p.output = output;
    p.output_step = layer.in_features;
    return p;
  }

  const KernelTable& table;
  const Kernels<S>& kernels;
  const BackwardPass& pass;
  const Network& network;
  const Layers layers;
  const Matrix grad_output;
  S* const grad_input;
  const int64_t rows, width, block, chunks;
  const bool copies_input, copies_grad;
};

}  // namespace

template <class S> std::vector<Layers> divide(const Network& network) {
  std::vector<Layers> all;
  int64_t bytes = 0;
  for (size_t l = 0; l < network.layers.size(); l++) {
    const Layer& layer = network.layers[l];
    const bool narrow = is_narrow<S>(layer);
    const int64_t own = layer.in_features * layer.out_features * int64_t(sizeof(S));
    if (narrow && l > 0 && all.back().narrow && bytes + own <= group_bytes) {
      all.back().end++;
      bytes += own;
    } else {
      all.push_back({l, l + 1, narrow});
      bytes = own;
    }
  }
  return all;
}

template <class S>
void forward_blocks(const KernelTable& table, const Network& network, const Layers& layers, const Matrix& input,
                    int64_t rows, const Place<S>* places, int threads) {
  Forward<S>(table, network, layers, input, rows, places).run(threads);
}

bool gapless_for_blocks(const BackwardPass& pass, const Layers& layers) {
  for (size_t l = layers.first == 0 ? 0 : layers.first - 1; l < layers.end; l++) {
    const Matrix& x = pass.saved[l];
    if (x.data && !is_gapless(x, pass.network.rows, pass.network.layers[l].out_features)) return false;
  }
  return true;
}

template <class S>
void backward_blocks(const KernelTable& table, const BackwardPass& pass, const Layers& layers,
                     const Matrix& grad_output, S* grad_input, int threads) {
  Backward<S>(table, pass, layers, grad_output, grad_input).run(threads);
}

template std::vector<Layers> divide<float>(const Network&);
template std::vector<Layers> divide<double>(const Network&);
template std::vector<Layers> divide<BFloat16>(const Network&);
template std::vector<Layers> divide<Float16>(const Network&);
template void forward_blocks(const KernelTable&, const Network&, const Layers&, const Matrix&, int64_t,
                             const Place<float>*, int);
template void forward_blocks(const KernelTable&, const Network&, const Layers&, const Matrix&, int64_t,
                             const Place<double>*, int);
template void backward_blocks(const KernelTable&, const BackwardPass&, const Layers&, const Matrix&, float*, int);
template void backward_blocks(const KernelTable&, const BackwardPass&, const Layers&, const Matrix&, double*, int);

}  // namespace fastmlp::cpu
