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

template <class S> bool is_narrow_throughout(const Network& network) {
  const std::vector<Layers> parts = divide<S>(network);
  return parts.size() == 1 && parts.front().narrow;
}

// What the two passes keep, layer by layer.
template <class S> struct Kept {
  std::vector<S*> layers;
  S *output, *grad;

  Kept(const Network& network, Carver& carver) {
    layers.reserve(network.layers.size());
    for (const Layer& layer : network.layers) layers.push_back(carver.take<S>(network.rows * layer.out_features));
    const int64_t outputs = network.layers.back().out_features;
    output = keeps_output(network.layers.back().activation) ? layers.back() : carver.take<S>(network.rows * outputs);
    grad = carver.take<S>(network.rows * outputs);
  }
};

template <class S> double train_layers(const StepPass& pass, const BatchLoss<S>& loss, char* memory, int threads) {
  const Network& network = pass.backward.network;
  Carver carver(memory);
  const Kept<S> kept(network, carver);
  ForwardPass forward_pass{network, {kept.layers.begin(), kept.layers.end()}, kept.output};
  // The last one's entry is for its pre-activation.
  if (kept.output == kept.layers.back()) forward_pass.kept.back() = nullptr;
  forward(forward_pass, threads);
  const double sum = loss.rows({0, network.rows}, kept.output, kept.grad);
  BackwardPass backward_pass = pass.backward;
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
    return loss.of(memory ? train_layers(pass, loss, static_cast<char*>(memory), threads)
                          : train_blocks(table, pass, loss, threads));
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
