// The packed layers of a frozen network: weights in panels of NR features, units of k one after another, and padded
// biases, all in one block of memory. Made by frozen.cpp, read by frozen_rows.h and frozen_columns.h. Nothing changes
// after the constructor, so that any number of threads may read it.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../contract/problem.h"
#include "ahead.h"
#include "kernel_table.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {

template <class S> struct PackedLayer {
  using C = Compute<S>;
  int64_t n, k, units;  // outputs, inputs, and units of these
  int64_t step;         // units that are summed one after another
  C* panels;            // of NR features each
  C* bias;              // null, or padded to whole panels
  ActivationSpec activation;
};

template <class S> class PackedLayers {
  using C = Compute<S>;

 public:
  PackedLayers(const Kernels<S>& kernels, const Network& network) : kernels(kernels), nr(kernels.nr) {
    Carver measure;
    for (const Layer& layer : network.layers) layers.push_back(place(layer, measure));
    used = measure.used();
    memory.reset(static_cast<char*>(::operator new(std::max<size_t>(used, 1), alignment)));
    prefer_huge_pages(memory.get(), used);
    Carver carver(memory.get());
    for (size_t l = 0; l < layers.size(); l++) {
      layers[l] = place(network.layers[l], carver);
      fill(network.layers[l], layers[l]);
      widest_ = std::max({widest_, layers[l].n, layers[l].k});
    }
  }

  size_t size() const { return layers.size(); }
  const PackedLayer<S>& operator[](size_t l) const { return layers[l]; }
  int64_t in_features() const { return layers.front().k; }
  int64_t widest() const { return widest_; }  // of the features of any layer
  int64_t bytes() const { return int64_t(used); }

  // What is read after a tile: the weights from `panel` on, unless they all stay in an L2 cache. So many tiles of so
  // many units share the prefetches.
  Ahead weights_after(const C* panel, int64_t units, int64_t tiles) const {
    constexpr int64_t l2_bytes = 512 << 10;
    if (bytes() <= l2_bytes) return {};
    Ahead ahead(panel, std::min(panel + units * nr, reinterpret_cast<const C*>(memory.get() + bytes())));
    ahead.spread(units * tiles);
    return ahead;
  }

  // Writes what was packed: the weight, [n, k] without gaps, and the bias, if there is one.
  void unpack(size_t l, void* weight, void* bias) const {
    const PackedLayer<S>& layer = layers[l];
    S* out = static_cast<S*>(weight);
    for (int64_t j = 0; j < layer.n; j++) {
      const C* panel = layer.panels + j / nr * nr * layer.units + j % nr;
      for (int64_t p = 0; p < layer.k; p++, out++) {
        const C* at = panel + p / kernels.k_unit * nr;
        if (kernels.k_unit == 1) {
          kernels.narrow(1, at, out);
        } else {
          std::memcpy(out, reinterpret_cast<const char*>(at) + p % kernels.k_unit * int64_t(sizeof(S)), sizeof(S));
        }
      }
    }
    if (layer.bias) std::copy_n(layer.bias, layer.n, static_cast<C*>(bias));
  }

 private:
  struct Release {
    void operator()(char* data) const { ::operator delete(data, alignment); }
  };
  static constexpr std::align_val_t alignment{size_t(4096)};

  PackedLayer<S> place(const Layer& layer, Carver& carver) const {
    PackedLayer<S> packed;
    packed.n = layer.out_features;
    packed.k = layer.in_features;
    packed.units = kernels.units(packed.k);
    packed.step = even_block(packed.units, kernels.chain / kernels.k_unit);
    packed.panels = carver.take<C>(round_up(packed.n, nr) * packed.units);
    packed.bias = layer.bias.data ? carver.take<C>(round_up(packed.n, nr)) : nullptr;
    packed.activation = layer.activation;
    return packed;
  }

  void fill(const Layer& layer, PackedLayer<S>& packed) const {
    for (int64_t j = 0; j < packed.n; j += nr) {
      kernels.pack_b(static_cast<const S*>(layer.weight.data) + j * layer.weight.row_stride, layer.weight.row_stride,
                     layer.weight.column_stride, std::min(nr, packed.n - j), packed.k,
                     packed.panels + j * packed.units);
    }
    if (!packed.bias) return;
    std::fill_n(packed.bias, round_up(packed.n, nr), C(0));
    const C* bias = static_cast<const C*>(layer.bias.data);
    for (int64_t j = 0; j < packed.n; j++) packed.bias[j] = bias[j * layer.bias.stride];
  }

  const Kernels<S>& kernels;
  const int64_t nr;
  std::unique_ptr<char, Release> memory;
  size_t used = 0;
  std::vector<PackedLayer<S>> layers;
  int64_t widest_ = 0;
};

}  // namespace fastmlp::cpu
