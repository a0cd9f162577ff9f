// The loops of row_blocks.h. Baseline code; arithmetic is behind the table.
//
// Activations are row-major in memory and never packed: the row kernels read A where it is. For the forward product
// weights are packed once per call; dgrad reads them as they are, and wgrad reads saved outputs as they are.
#include "row_blocks.h"

#include <algorithm>

#include "gemm.h"
#include "row_product.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// Weights of layers that go together, beside a block of rows in the L2 cache.
constexpr int64_t layer_bytes = 128 << 10, group_bytes = 256 << 10, most_features = 2048;
// What a block of rows may take in each of its layers.
constexpr int64_t block_bytes = 32 << 10;
constexpr int64_t fewest_rows = 56, most_rows = 192;

template <class S> bool is_narrow(const Layer& layer) {
  const int64_t bytes = layer.in_features * layer.out_features * int64_t(sizeof(S));
  return in_itself<S> && bytes <= layer_bytes && std::max(layer.in_features, layer.out_features) <= most_features;
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
    steps.reserve(layers.end - layers.first);
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

  // For who runs blocks himself: memory for all threads, memory of each, and what has to be done once.
  struct Own {
    S *tile, *dot_bias, *input;
    S* hidden[2];
    Place<S>* places;  // of the block, by layer
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
    own.places = carver.take<Place<S>>(int64_t(layers.end));
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

  // Rows of the input as the kernels read them.
  Matrix input_of(Range range, const Own& own) const {
    if (copies_input) return copied(input, range, network.layers[layers.first].in_features, own.input);
    Matrix x = input;
    x.data = static_cast<S*>(input.data) + range.begin * input.row_stride;
    return x;
  }

  int64_t rows_of_block() const { return block; }

  // `m` rows through all layers, to own.places.
  void run_rows(Matrix x, int64_t m, const Own& own) const {
    for (size_t l = layers.first; l < layers.end; l++) {
      const Place<S>& place = own.places[l];
      S* const output = place.output ? place.output : own.hidden[l % 2];
      run_layer(network.layers[l], steps[l - layers.first], m, x, output, place, own);
      x = {output, network.layers[l].out_features, 1};
    }
  }

 private:
  struct Step {
    bool dots;
    S* panels;
    S* bias;
  };

  void run_block(Range range, const Own& own) const {
    for (size_t l = layers.first; l < layers.end; l++) {
      const int64_t at = range.begin * network.layers[l].out_features;
      const auto here = [&](S* place) { return place ? place + at : nullptr; };
      own.places[l] = {here(places[l].output), here(places[l].pre_activation)};
    }
    run_rows(input_of(range, own), range.size(), own);
  }

  void run_layer(const Layer& layer, const Step& step, int64_t m, const Matrix& x, S* output, const Place<S>& place,
                 const Own& own) const {
    if (step.dots) {
      Product<S> p;
      set_forward(p, layer, m, x, output, place.pre_activation);
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
    p.pre_activation = place.pre_activation;
    p.bias = step.bias;
    p.fresh_a = &layer == &network.layers[layers.first] && x.row_stride == layer.in_features;
    p.fresh_output = place.output != nullptr;
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
    run_blocks(threads, 0, [&](Range range, int64_t, const Own& own, char*) { return block_of(range, own); });
  }

  // Gradients of one layer, over some of the rows.
  struct Sum {
    S* weight = nullptr;
    S* bias = nullptr;
  };
  using Sums = std::vector<Sum>;
  using Shared = std::vector<S*>;  // packed weights of each layer; null where they are read as they are
  struct Own {
    S *tile, *input, *layer_input;
    S* grad[2];
    const S** saved;  // of the block, by layer
  };

  // The input of a block's first layer, and the gradient of its last one's output.
  struct Block {
    Matrix input;
    const S* grad;
  };

  // Block after block: prepare(rows, chunk, own, memory) says what block it is and fills own.saved. `memory` is the
  // thread's own, of so many bytes.
  template <class Prepare> void run_blocks(int threads, size_t bytes, const Prepare& prepare) const {
    Carver shared_size, own_size, share_size;
    carve_shared(shared_size);
    carve_own(own_size);
    carve_sums(share_size);
    const size_t share = chunks > 1 ? share_size.used() : 0;
    threads = int(std::min<int64_t>(useful_threads(2 * multiply_adds(network, layers, rows), threads), chunks));
    const size_t own_bytes = own_size.used() + bytes;
    const Workspace workspace(shared_size.used() + size_t(chunks) * share + size_t(threads) * own_bytes);
    Carver carver(workspace.data());
    const Shared shared = carve_shared(carver);
    char* const shares = workspace.data() + shared_size.used();
    char* const owns = shares + size_t(chunks) * share;
    std::vector<Sums> sums;  // of each chunk; here, since threads must not allocate
    sums.reserve(size_t(chunks));
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      Carver share_carver(shares + size_t(chunk) * share);
      sums.push_back(chunks > 1 ? carve_sums(share_carver) : results());
    }
    pack_weights(shared);
    run_tasks(chunks, threads, [&](int64_t chunk, int slot) {
      Carver own_carver(owns + size_t(slot) * own_bytes);
      const Own own = carve_own(own_carver);
      char* const memory = owns + size_t(slot) * own_bytes + own_size.used();
      table.mark();
      const Range range = part_of(rows, 1, chunk, chunks);
      const int64_t blocks = std::max<int64_t>(1, ceil_divide(range.size(), block));
      for (int64_t b = 0; b < blocks; b++) {
        const Range part = part_of(range.size(), 1, b, blocks);
        const Range here{range.begin + part.begin, range.begin + part.end};
        run_rows(here, prepare(here, chunk, own, memory), b > 0, shared, own, sums[size_t(chunk)]);
      }
    });
    if (chunks > 1) reduce(shares, share);
  }

  int64_t chunk_count() const { return chunks; }

 private:
  Shared carve_shared(Carver& carver) const {
    Shared shared;
    shared.reserve(layers.end - layers.first);
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
    own.input = copies_input ? carver.take<S>(block * network.layers[0].in_features) : nullptr;
    own.layer_input = carver.take<S>(block * width);
    for (S*& grad : own.grad) grad = carver.take<S>(block * width);
    own.saved = carver.take<const S*>(int64_t(layers.end));
    return own;
  }
  Sums carve_sums(Carver& carver) const {
    Sums sums;
    sums.reserve(layers.end - layers.first);
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
    sums.reserve(layers.end - layers.first);
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

  bool in_place(size_t l) const { return network.layers[l].weight.column_stride == 1; }
  bool needs_dgrad(size_t l) const { return l > layers.first || grad_input; }

  Block block_of(Range range, const Own& own) const {
    const size_t last = layers.end - 1;
    const int64_t outputs = network.layers[last].out_features;
    Block found{network.input, static_cast<const S*>(grad_output.data) + range.begin * outputs};
    if (copies_grad) found.grad = static_cast<const S*>(copied(grad_output, range, outputs, own.grad[last % 2]).data);
    for (size_t l = layers.first == 0 ? 0 : layers.first - 1; l < layers.end; l++) {
      const S* const saved = static_cast<const S*>(pass.saved[l].data);
      own.saved[l] = saved ? saved + range.begin * network.layers[l].out_features : nullptr;
    }
    if (copies_input) {
      found.input = copied(network.input, range, network.layers[0].in_features, own.input);
    } else {
      found.input.data = static_cast<S*>(network.input.data) + range.begin * network.input.row_stride;
    }
    return found;
  }

  // Adds the block's share to the sums, or begins them with it.
  void run_rows(Range range, const Block& rows, bool add, const Shared& shared, const Own& own,
                const Sums& sums) const {
    const int64_t m = range.size();
    const S* grad = rows.grad;
    for (size_t l = layers.end; l-- > layers.first;) {
      const Layer& layer = network.layers[l];
      S* const own_grad = own.grad[l % 2];
      if (layer.activation.kind != identity_kind) {
        kernels.activations[layer.activation.kind].gradient(m * layer.out_features, grad, own.saved[l], own_grad,
                                                            layer.activation.scalars);
        grad = own_grad;
      }
      const Sum& sum = sums[l - layers.first];
      if (sum.bias) kernels.column_sums(m, layer.out_features, grad, sum.bias, add);
      if (sum.weight) multiply_rows(kernels, wgrad(l, rows.input, m, grad, own, sum.weight, add), own.tile);
      if (!needs_dgrad(l)) break;
      S* const output = l == layers.first ? grad_input + range.begin * layer.in_features : own.grad[(l + 1) % 2];
      multiply_rows(kernels, dgrad(l, m, grad, shared[l - layers.first], output), own.tile);
      grad = output;
    }
  }

  RowProduct<S> wgrad(size_t l, const Matrix& input, int64_t m, const S* grad, const Own& own, S* sum, bool add) const {
    const Layer& layer = network.layers[l];
    RowProduct<S> p;
    p.m = layer.out_features;
    p.n = layer.in_features;
    p.k = m;
    p.a = grad;
    p.a_step = 1;
    p.a_k_step = layer.out_features;
    p.b_step = layer.in_features;
    if (l == 0) {
      p.b = static_cast<const S*>(input.data);
      p.b_step = input.row_stride;
    } else if (keeps_output(network.layers[l - 1].activation)) {
      p.b = own.saved[l - 1];
    } else {
      const ActivationSpec& below = network.layers[l - 1].activation;
      kernels.activations[below.kind].value(p.k * p.n, own.saved[l - 1], own.layer_input, below.scalars);
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

template <class S>
double train_blocks(const KernelTable& table, const StepPass& pass, const BatchLoss<S>& loss, int threads) {
  const Network& network = pass.backward.network;
  const Layers layers{0, network.layers.size(), true};
  const int64_t outputs = network.layers.back().out_features;
  Forward<S> forward(table, network, layers, network.input, network.rows, nullptr);
  const Backward<S> backward(table, pass.backward, layers, {nullptr, outputs, 1}, nullptr);
  Carver shared_size;
  forward.carve_shared(shared_size);
  const Workspace workspace(shared_size.used());
  Carver shared(workspace.data());
  forward.carve_shared(shared);
  forward.prepare();

  struct Own {
    typename Forward<S>::Own forward;
    S *output, *grad;
  };
  const int64_t block = forward.rows_of_block();
  // Fills `saved` with memory for what backward reads.
  const auto carve = [&](Carver& carver, const S** saved) {
    Own own{forward.carve_own(carver), carver.take<S>(block * outputs), carver.take<S>(block * outputs)};
    for (size_t l = 0; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const bool last = l + 1 == layers.end, keeps = keeps_output(layer.activation);
      S* const kept = last && keeps ? own.output : carver.take<S>(block * layer.out_features);
      if (!saved) continue;
      saved[l] = kept;
      own.forward.places[l] = {last ? own.output : keeps ? kept : nullptr, keeps ? nullptr : kept};
    }
    return own;
  };
  Carver own_size;
  carve(own_size, nullptr);
  std::vector<double> losses(size_t(backward.chunk_count()), 0.0);
  backward.run_blocks(threads, own_size.used(), [&](Range range, int64_t chunk, const auto& rows, char* memory) {
    Carver carver(memory);
    const Own own = carve(carver, rows.saved);
    const Matrix input = forward.input_of(range, own.forward);
    forward.run_rows(input, range.size(), own.forward);
    losses[size_t(chunk)] += loss.rows(range, own.output, own.grad);
    return typename Backward<S>::Block{input, own.grad};
  });
  double sum = 0;
  for (const double part : losses) sum += part;
  return sum;
}

template <class S> std::vector<Layers> divide(const Network& network) {
  std::vector<Layers> all;
  all.reserve(network.layers.size());
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
template double train_blocks(const KernelTable&, const StepPass&, const BatchLoss<float>&, int);
template double train_blocks(const KernelTable&, const StepPass&, const BatchLoss<double>&, int);

}  // namespace fastmlp::cpu
