// Which layers of a training step run how, and how updates are shared among threads. Called through step.h by
// register.cpp. Must stay baseline code: arithmetic is behind the table of the instruction set.
#include "step.h"

#include <algorithm>

#include "../contract/activation_info.h"
#include "batch_loss.h"
#include "dispatch.h"
#include "network.h"
#include "parallel.h"
#include "row_blocks.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

void update_part(const KernelTable& table, const Part<Update>& part) {
  with_storage(part.whole->dtype, [&](auto storage) {
    const auto& kernels = kernels_of<decltype(storage)>(table);
    kernels.updates[part.whole->spec.rule](*part.whole, part.range.begin, part.range.end);
  });
}

// What the two passes keep, layer by layer.
template <class S> struct Kept {
  struct Moments {
    S *mean, *rstd;  // of the batch; null for layers that do not normalise by it
  };
  std::vector<S*> layers;
  std::vector<Moments> moments;
  S *output, *grad;

  Kept(const Network& network, Carver& carver) {
    const Layer& last = network.layers.back();
    layers.reserve(network.layers.size());
    moments.reserve(network.layers.size());
    for (const Layer& layer : network.layers) {
      layers.push_back(carver.take<S>(network.rows * layer.out_features));
      const bool has_moments = layer.map == Map::batch_norm && layer.norm.of_batch;
      const auto take = [&] { return has_moments ? carver.take<S>(layer.out_features) : nullptr; };
      moments.push_back({take(), take()});
    }
    const int64_t outputs = network.rows * last.out_features;
    output = keeps_output(last.activation) && !last.drops() ? layers.back() : carver.take<S>(outputs);
    grad = carver.take<S>(outputs);
  }
};

template <class S> double train_layers(const StepPass& pass, const BatchLoss<S>& loss, char* memory, int threads) {
  Carver carver(memory);
  BackwardPass backward_pass = pass.backward;
  Network& network = backward_pass.network;
  const Kept<S> kept(network, carver);
  for (size_t l = 0; l < network.layers.size(); l++) {
    network.layers[l].norm.mean = kept.moments[l].mean;
    network.layers[l].norm.rstd = kept.moments[l].rstd;
  }
  ForwardPass forward_pass{network, {kept.layers.begin(), kept.layers.end()}, kept.output};
  // The last one's entry is for what is not its output.
  if (kept.output == kept.layers.back()) forward_pass.kept.back() = nullptr;
  forward(forward_pass, threads);
  const double sum = loss.rows({0, network.rows}, kept.output, kept.grad);
  backward_pass.saved.clear();
  for (size_t l = 0; l < network.layers.size(); l++) {
    backward_pass.saved.push_back({kept.layers[l], network.layers[l].out_features, 1});
  }
  backward_pass.grad_output = {kept.grad, network.layers.back().out_features, 1};
  backward(backward_pass, threads);
  return sum;
}

}  // namespace

size_t train_bytes(const StepPass& pass) {
  const Network& network = pass.backward.network;
  const auto of = [&](auto storage) {
    using S = decltype(storage);
    Carver measure;
    if (!is_narrow_throughout<S>(network)) Kept<S>(network, measure);
    return measure.used();
  };
  return network.dtype == DType::float64 ? of(double{}) : of(float{});
}

std::optional<double> train(const StepPass& pass, void* memory, int threads) {
  const KernelTable& table = active();
  const Network& network = pass.backward.network;
  const auto of = [&](auto storage) {
    using S = decltype(storage);
    const BatchLoss<S> loss(kernels_of<S>(table), pass.targets, network.rows, network.layers.back().out_features);
    return loss.of(is_narrow_throughout<S>(network) ? train_blocks(table, pass, loss, threads)
                                                    : train_layers(pass, loss, static_cast<char*>(memory), threads));
  };
  return network.dtype == DType::float64 ? of(double{}) : of(float{});
}

void update(const std::vector<Update>& updates, int threads) {
  const KernelTable& table = active();
  int64_t elements = 0;
  for (const Update& one : updates) elements += one.n;
  // Reading and writing an element takes as long as some multiply-adds of a product.
  threads = useful_threads(16.0 * double(elements), threads);
  table.mark();
  if (threads == 1) {
    for (const Update& one : updates) update_part(table, {&one, {0, one.n}});
    return;
  }
  const std::vector<Part<Update>> parts = parts_of(updates);
  run_tasks(int64_t(parts.size()), threads, [&](int64_t i, int) { update_part(table, parts[size_t(i)]); });
}

}  // namespace fastmlp::cpu
