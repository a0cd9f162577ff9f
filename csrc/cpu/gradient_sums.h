// Where a backward pass in blocks of rows adds up the gradients of parameters. Used by row_backward.h. Rows are cut
// into chunks by their number alone, each chunk has sums of its own, and these are added in order; so the bits of a
// gradient do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../contract/problem.h"
#include "parallel.h"
#include "row_blocks.h"
#include "workspace.h"

namespace fastmlp::cpu {

// The gradients of one layer's parameters, summed over some of the rows; null for what is not asked for.
template <class S> struct LayerSums {
  S* weight = nullptr;
  S* bias = nullptr;
};

// The gradients of all layers' parameters, for each chunk of rows: in memory of its own, from which add_up adds the
// chunks into the results, or, if there is but one chunk, the results themselves.
template <class S> class GradientSums {
 public:
  GradientSums(const BackwardPass& pass, const Layers& layers, int64_t chunks)
      : pass(pass), layers(layers), chunks(chunks) {
    Carver measure;
    carve(measure);
    if (chunks > 1) chunk_bytes = measure.used();
  }

  size_t bytes() const { return size_t(chunks) * chunk_bytes; }

  // Allocates what threads must not allocate. `memory` has `bytes()` bytes.
  void place(char* memory) {
    shares = memory;
    sums.reserve(size_t(chunks));
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      Carver carver(memory + size_t(chunk) * chunk_bytes);
      sums.push_back(chunks > 1 ? carve(carver) : results());
    }
  }

  const std::vector<LayerSums<S>>& of_chunk(int64_t chunk) const { return sums[size_t(chunk)]; }

  void add_up() const {
    if (chunks == 1) return;
    add_chunks(reinterpret_cast<S*>(shares), chunks, int64_t(chunk_bytes / sizeof(S)));
    const std::vector<LayerSums<S>>& total = sums.front();
    const std::vector<LayerSums<S>> to = results();
    for (size_t i = 0; i < to.size(); i++) {
      const Layer& layer = pass.network.layers[layers.first + i];
      if (to[i].weight) std::copy_n(total[i].weight, layer.in_features * layer.out_features, to[i].weight);
      if (to[i].bias) std::copy_n(total[i].bias, layer.out_features, to[i].bias);
    }
  }

 private:
  std::vector<LayerSums<S>> carve(Carver& carver) const {
    std::vector<LayerSums<S>> chunk;
    chunk.reserve(layers.end - layers.first);
    for (size_t l = layers.first; l < layers.end; l++) {
      const Layer& layer = pass.network.layers[l];
      LayerSums<S>& sum = chunk.emplace_back();
      if (pass.grad_weights[l]) sum.weight = carver.take<S>(layer.in_features * layer.out_features);
      if (pass.grad_biases[l]) sum.bias = carver.take<S>(layer.out_features);
    }
    return chunk;
  }

  std::vector<LayerSums<S>> results() const {
    std::vector<LayerSums<S>> all;
    all.reserve(layers.end - layers.first);
    for (size_t l = layers.first; l < layers.end; l++) {
      all.push_back({static_cast<S*>(pass.grad_weights[l]), static_cast<S*>(pass.grad_biases[l])});
    }
    return all;
  }

  const BackwardPass& pass;
  const Layers layers;
  const int64_t chunks;
  size_t chunk_bytes = 0;
  char* shares = nullptr;
  std::vector<std::vector<LayerSums<S>>> sums;
};

}  // namespace fastmlp::cpu
