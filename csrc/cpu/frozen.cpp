// Frozen networks as frozen.h declares them: where rows of an input lie, and which of two forms a call takes. Called by
// register.cpp. Baseline code, which leaves arithmetic to the kernels of the table.
//
// Activations take one of two forms, rows (frozen_rows.h) or columns (frozen_columns.h). Both read the same packed
// layers (frozen_layers.h), and add the same products in the same order.
#include "frozen.h"

#include <algorithm>
#include <vector>

#include "frozen_columns.h"
#include "frozen_layers.h"
#include "frozen_rows.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {

InputRows::InputRows(const void* data, int dimensions, const int64_t* sizes, const int64_t* steps, int64_t element_step)
    : data_(static_cast<const char*>(data)), element_step_(element_step) {
  for (int d = dimensions; d-- > 0;) {
    count_ *= sizes[d];
    if (sizes[d] == 1) continue;
    int64_t& size = sizes_[dimensions_ == 0 ? 0 : dimensions_ - 1];
    if (dimensions_ > 0 && steps[d] == size * steps_[dimensions_ - 1]) {
      size *= sizes[d];
    } else {
      sizes_[dimensions_] = sizes[d];
      steps_[dimensions_++] = steps[d];
    }
  }
}

const char* InputRows::row(int64_t i) const {
  if (even()) return data_ + i * step();
  const char* at = data_;
  for (int d = 0; d + 1 < dimensions_; d++, i /= sizes_[d - 1]) at += i % sizes_[d] * steps_[d];
  return at + i * steps_[dimensions_ - 1];
}

namespace {

template <class S> class Packed final : public PackedNetwork {
 public:
  Packed(const KernelTable& table, const Network& network, const FrozenEnds& ends)
      : PackedNetwork(table, network, ends),
        packed(kernels_of<S>(table), network),
        rows_form(table, packed, ends.float32),
        columns_form(table, packed, ends.float32, rows_form),
        nr(kernels_of<S>(table).nr),
        rows_cost(rows_form.cost()),
        columns_cost(columns_form.cost()) {
    bytes_ = packed.bytes();
  }

  void run(const InputRows& input, void* output, int threads) const override {
    const int64_t rows = input.count();
    if (rows == 0 || out_features() == 0) return;
    if (double(round_up(rows, nr)) * columns_cost < double(rows) * rows_cost) {
      run_blocks(columns_form, nr, input, output, threads);
    } else {
      run_blocks(rows_form, 1, input, output, threads);
    }
  }

  void unpack(size_t layer, void* weight, void* bias) const override { packed.unpack(layer, weight, bias); }

 private:
  // Blocks of rows, each of them through all layers. Blocks begin at multiples of `unit`.
  template <class Form>
  void run_blocks(const Form& form, int64_t unit, const InputRows& input, void* output, int threads) const {
    const int64_t rows = input.count();
    const int64_t blocks = ceil_divide(rows, form.block_rows());
    const int64_t longest = std::min(round_up(rows, unit), round_up(ceil_divide(rows, blocks), unit) + unit);
    threads = int(std::min<int64_t>(useful_threads(multiply_adds() * double(rows), threads), blocks));
    Carver own;
    form.carve(own, longest);
    const Workspace workspace(size_t(threads) * own.used());
    run_tasks(blocks, threads, [&](int64_t b, int slot) {
      Carver carver(workspace.data() + size_t(slot) * own.used());
      const FrozenScratch<S> scratch = form.carve(carver, longest);
      table_.mark();
      const Range part = part_of(rows, unit, b, blocks);
      form.run(input, part, output, scratch);
      if (ends_.head == Head::none) return;
      ends_.float32 ? apply_head<float>(part, output) : apply_head<S>(part, output);
    });
  }

  // To some rows of an output of elements T.
  template <class T> void apply_head(Range rows, void* output) const {
    T* const first = static_cast<T*>(output) + rows.begin * out_features();
    kernels_of<T>(table_).head(rows.size(), out_features(), ends_.head == Head::log_softmax, first);
  }

  const PackedLayers<S> packed;
  const FrozenRows<S> rows_form;
  const FrozenColumns<S> columns_form;
  const int64_t nr;
  const double rows_cost, columns_cost;  // for one row
};

}  // namespace

PackedNetwork::PackedNetwork(const KernelTable& table, const Network& network, const FrozenEnds& ends)
    : table_(table), dtype_(network.dtype), ends_(ends) {
  for (const Layer& layer : network.layers) {
    layers_.push_back({layer.in_features, layer.out_features, layer.bias.data != nullptr, layer.activation});
    multiply_adds_ += double(layer.in_features) * double(layer.out_features);
  }
}

std::shared_ptr<const PackedNetwork> PackedNetwork::pack(const KernelTable& table, const Network& network,
                                                         const FrozenEnds& ends) {
  return with_storage(network.dtype, [&](auto storage) -> std::shared_ptr<const PackedNetwork> {
    return std::make_shared<Packed<decltype(storage)>>(table, network, ends);
  });
}

std::shared_ptr<const PackedNetwork> PackedNetwork::packed_for(const KernelTable& table) const {
  constexpr int64_t most_bytes = sizeof(double);
  Network network;
  network.dtype = dtype_;
  std::vector<std::vector<char>> memory;
  for (size_t l = 0; l < layers_.size(); l++) {
    const FrozenLayer& from = layers_[l];
    Layer& layer = network.layers.emplace_back();
    layer.in_features = from.in_features;
    layer.out_features = from.out_features;
    layer.activation = from.activation;
    memory.emplace_back(size_t(std::max<int64_t>(1, from.in_features * from.out_features) * most_bytes));
    layer.weight = {memory.back().data(), from.in_features, 1};
    if (from.has_bias) {
      memory.emplace_back(size_t(std::max<int64_t>(1, from.out_features) * most_bytes));
      layer.bias = {memory.back().data(), 1};
    }
    unpack(l, layer.weight.data, layer.bias.data);
  }
  return pack(table, network, ends_);
}

}  // namespace fastmlp::cpu
