// Which layers are narrow and go together, and the passes over them: forward, backward, and both at once for a training
// step. Called by network.cpp and step.cpp. Baseline code, which leaves arithmetic to the kernels of the table.
#include "row_blocks.h"

#include <algorithm>

#include "../contract/activation_info.h"
#include "row_backward.h"
#include "row_forward.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// What the weights of one layer, and of layers that go together, may take of an L2 cache beside a block of rows.
constexpr int64_t layer_bytes = 128 << 10, group_bytes = 256 << 10, most_features = 2048;

template <class S> bool is_narrow(const Layer& layer) {
  const int64_t bytes = layer.in_features * layer.out_features * int64_t(sizeof(S));
  return in_itself<S> && layer.map == Map::product && bytes <= layer_bytes &&
         std::max(layer.in_features, layer.out_features) <= most_features;
}

}  // namespace

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

template <class S> bool is_narrow_throughout(const Network& network) {
  int64_t bytes = 0;
  for (const Layer& layer : network.layers) {
    if (!is_narrow<S>(layer)) return false;
    bytes += layer.in_features * layer.out_features * int64_t(sizeof(S));
  }
  return bytes <= group_bytes;
}

template <class S>
void forward_blocks(const KernelTable& table, const Network& network, const Layers& layers, const Matrix& input,
                    int64_t rows, const Place<S>* places, int threads) {
  RowForward<S>(table, network, layers, input, rows, places).run(threads);
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
  RowBackward<S>(table, pass, layers, grad_output, grad_input).run(threads);
}

template <class S>
double train_blocks(const KernelTable& table, const StepPass& pass, const BatchLoss<S>& loss, int threads) {
  const Network& network = pass.backward.network;
  const Layers layers{0, network.layers.size(), true};
  const int64_t outputs = network.layers.back().out_features;
  RowForward<S> forward(table, network, layers, network.input, network.rows, nullptr);
  const RowBackward<S> backward(table, pass.backward, layers, {nullptr, outputs, 1}, nullptr);
  Carver shared_size;
  forward.carve_shared(shared_size);
  const Workspace workspace(shared_size.used());
  Carver shared(workspace.data());
  forward.carve_shared(shared);
  forward.prepare();

  struct Own {
    typename RowForward<S>::Own forward;
    S *output, *grad;
  };
  const int64_t block = forward.rows_of_block();
  // Memory of one thread. Fills `saved`, unless it is null, with where forward writes what backward reads.
  const auto carve = [&](Carver& carver, const S** saved) {
    Own own{forward.carve_own(carver), carver.take<S>(block * outputs), carver.take<S>(block * outputs)};
    for (size_t l = 0; l < layers.end; l++) {
      const Layer& layer = network.layers[l];
      const bool keeps = keeps_output(layer.activation);
      S* const end = l + 1 == layers.end ? own.output : nullptr;
      S* const kept = end && keeps && !layer.drops() ? end : carver.take<S>(block * layer.out_features);
      if (!saved) continue;
      saved[l] = kept;
      own.forward.places[l] = {end && !layer.drops() ? end
                               : keeps               ? kept
                                                     : nullptr,
                               keeps ? nullptr : kept, layer.drops() ? end : nullptr};
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
    forward.run_rows(input, range, own.forward);
    losses[size_t(chunk)] += loss.rows(range, own.output, own.grad);
    return typename RowBackward<S>::Block{input, own.grad};
  });
  double sum = 0;
  for (const double part : losses) sum += part;
  return sum;
}

template std::vector<Layers> divide<float>(const Network&);
template std::vector<Layers> divide<double>(const Network&);
template std::vector<Layers> divide<BFloat16>(const Network&);
template std::vector<Layers> divide<Float16>(const Network&);
template bool is_narrow_throughout<float>(const Network&);
template bool is_narrow_throughout<double>(const Network&);
template void forward_blocks(const KernelTable&, const Network&, const Layers&, const Matrix&, int64_t,
                             const Place<float>*, int);
template void forward_blocks(const KernelTable&, const Network&, const Layers&, const Matrix&, int64_t,
                             const Place<double>*, int);
template void backward_blocks(const KernelTable&, const BackwardPass&, const Layers&, const Matrix&, float*, int);
template void backward_blocks(const KernelTable&, const BackwardPass&, const Layers&, const Matrix&, double*, int);
template double train_blocks(const KernelTable&, const StepPass&, const BatchLoss<float>&, int);
template double train_blocks(const KernelTable&, const StepPass&, const BatchLoss<double>&, int);

}  // namespace fastmlp::cpu
