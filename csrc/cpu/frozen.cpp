// The loops of frozen.h. Baseline code; arithmetic is behind the table.
//
// Activations take one of two forms. As rows, they are A and the weights are B: vectors hold features, and few rows
// cost little. As columns, in panels like those of B, weights are A: vectors hold rows, so that narrow layers fill them
// too, if there are rows enough. Both add the same products in the same order.
#include "frozen.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <utility>

#include "../contract/activation_info.h"
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

// What activations of a block may take in a layer.
constexpr int64_t block_bytes = 64 << 10, column_bytes = 28 << 10;
constexpr int64_t fewest_rows = 112, most_rows = 192;

template <class S> struct PackedLayer {
  using C = Compute<S>;
  int64_t n, k, units;
  int64_t step;  // units that are summed one after another
  C* panels;     // of NR features each
  C* bias;       // null, or padded to whole panels
  ActivationSpec activation;
  bool simple;  // the kernel itself does what follows the sums
};

// Memory that is used soon. Tiles ask for it a little at a time, while they compute.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* begin, const void* end)
      : next_(static_cast<const char*>(begin)), end_(static_cast<const char*>(end)) {}
  // So that so many units of k suffice.
  void spread(int64_t units) {
    constexpr int64_t most = 2 * line_bytes;  // lines come in pairs
    step_ = std::clamp<int64_t>(ceil_divide(end_ - next_, std::max<int64_t>(1, units)), 1, most);
  }
  int64_t step() const { return step_; }
  // What a tile of so many units asks for, or null if all was asked for.
  const void* next(int64_t units) {
    if (next_ >= end_) return nullptr;
    return std::exchange(next_, next_ + units * step_);
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
  int64_t step_ = 0;
};

// Rows that lie a multiple of 4096 bytes apart fall into the same few lines of an L1 cache.
template <class T> int64_t row_step(int64_t n) {
  const int64_t line = line_bytes / int64_t(sizeof(T));
  const int64_t step = round_up(std::max<int64_t>(n, 1), line);
  return step * int64_t(sizeof(T)) % 1024 == 0 ? step + line : step;
}

template <class S> class Packed final : public FrozenNetwork {
  using C = Compute<S>;

 public:
  Packed(const KernelTable& table, const Network& network, bool float32_ends)
      : FrozenNetwork(table, network, float32_ends), kernels(kernels_of<S>(table)), nr(kernels.nr) {
    Carver measure;
    for (const Layer& layer : network.layers) packed.push_back(place(layer, measure));
    bytes_ = int64_t(measure.used());
    memory.reset(static_cast<char*>(::operator new(std::max<size_t>(measure.used(), 1), alignment)));
    prefer_huge_pages(memory.get(), measure.used());
    Carver carver(memory.get());
    for (size_t l = 0; l < packed.size(); l++) {
      packed[l] = place(network.layers[l], carver);
      fill(network.layers[l], packed[l]);
      widest = std::max({widest, packed[l].n, packed[l].k});
      rows_cost += double(packed[l].units * round_up(packed[l].n, kernels.lanes));
      columns_cost += double(packed[l].units * packed[l].n) * tile_cost;
    }
    columns_cost += double(kernels.units(in_features()) * kernels.lanes) * transposition_cost;
  }

  void run(const InputRows& input, void* output, int threads) const override {
    const int64_t rows = input.count();
    if (rows == 0 || out_features() == 0) return;
    const bool columns = as_columns(rows);
    const int64_t unit = columns ? nr : 1;
    const int64_t block = block_rows(columns);
    const int64_t blocks = ceil_divide(rows, block);
    const int64_t longest = std::min(round_up(rows, unit), round_up(ceil_divide(rows, blocks), unit) + unit);
    threads = int(std::min<int64_t>(useful_threads(multiply_adds() * double(rows), threads), blocks));
    Carver own;
    carve(own, columns, longest);
    const Workspace workspace(size_t(threads) * own.used());
    run_tasks(blocks, threads, [&](int64_t b, int slot) {
      Carver carver(workspace.data() + size_t(slot) * own.used());
      const Scratch scratch = carve(carver, columns, longest);
      const Range range = part_of(rows, unit, b, blocks);
      table_.mark();
      columns ? run_columns(input, range, output, scratch) : run_rows(input, range, output, scratch);
    });
  }

  void unpack(size_t l, void* weight, void* bias) const override {
    const PackedLayer<S>& layer = packed[l];
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
  using Memory = std::unique_ptr<char, Release>;

  struct Scratch {
    S *staging, *values[2];
    C *units, *sums, *last;
  };

  PackedLayer<S> place(const Layer& layer, Carver& carver) const {
    PackedLayer<S> packed;
    packed.n = layer.out_features;
    packed.k = layer.in_features;
    packed.units = kernels.units(packed.k);
    const int64_t chain = kernels.chain / kernels.k_unit;
    packed.step = ceil_divide(packed.units, std::max<int64_t>(1, ceil_divide(packed.units, chain)));
    packed.panels = carver.take<C>(round_up(packed.n, nr) * packed.units);
    packed.bias = layer.bias.data ? carver.take<C>(round_up(packed.n, nr)) : nullptr;
    packed.activation = layer.activation;
    packed.simple = layer.activation.kind == identity_kind || layer.activation.kind == relu_kind;
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

  // Tiles of weights are less tall than those of rows; and turning input takes as long as so many products of vectors.
  static constexpr double tile_cost = 1.03, transposition_cost = 0.5;
  // By the products of vectors that either form takes for so many rows.
  bool as_columns(int64_t rows) const { return double(round_up(rows, nr)) * columns_cost < double(rows) * rows_cost; }

  int64_t block_rows(bool columns) const {
    const int64_t bytes = std::max<int64_t>(1, widest) * int64_t(sizeof(C));
    if (columns) return std::max<int64_t>(1, column_bytes / bytes / nr) * nr;
    return std::clamp(block_bytes / bytes, fewest_rows, most_rows);
  }

  int64_t values_step(int64_t n) const { return row_step<S>(n); }
  int64_t units_step(int64_t k) const { return row_step<C>(kernels.units(k)); }

  Scratch carve(Carver& carver, bool columns, int64_t rows) const {
    const int64_t k = in_features();
    Scratch scratch;
    scratch.staging = carver.take<S>(columns ? nr * k : rows * values_step(k));
    const int64_t values = columns ? rows * round_up(widest, kernels.k_unit) : rows * values_step(widest);
    for (S*& place : scratch.values) place = carver.take<S>(values);
    scratch.units =
        in_itself<S> ? nullptr : carver.take<C>(columns ? rows * kernels.units(widest) : rows * units_step(widest));
    scratch.sums = carver.take<C>(std::max(rows, std::max(nr, most_panels * kernels.mr)) * nr);
    scratch.last = carver.take<C>(columns ? rows * kernels.lanes : 0);
    return scratch;
  }

  // The input as it lies, if it can be read so: steps in elements.
  bool readable(const InputRows& input) const {
    constexpr int64_t size = sizeof(S);
    return !float32_ends_ && in_features() > 0 && input.even() && input.step() % size == 0 &&
           input.element_step() % size == 0 && reinterpret_cast<uintptr_t>(input.row(0)) % size == 0;
  }

  // Rows of the input without gaps, `step` apart.
  void stage(const InputRows& input, Range rows, int64_t step, S* out) const {
    const int64_t k = in_features();
    if (k == 0) return;  // where there may be no memory
    for (int64_t i = rows.begin; i < rows.end; i++, out += step) {
      const char* from = input.row(i);
      if (float32_ends_) {
        constexpr int64_t run = 64;
        C values[run];
        for (int64_t p = 0; p < k; p += run) {
          const int64_t count = std::min(run, k - p);
          gather(from + p * input.element_step(), input.element_step(), count, values);
          kernels.narrow(count, values, out + p);
        }
      } else {
        gather(from, input.element_step(), k, out);
      }
    }
  }
  template <class T> static void gather(const char* from, int64_t step, int64_t count, T* out) {
    if (step == int64_t(sizeof(T))) {
      std::memcpy(out, from, size_t(count) * sizeof(T));
    } else {
      for (int64_t p = 0; p < count; p++) std::memcpy(out + p, from + p * step, sizeof(T));
    }
  }

  // The rows that follow a block, if they are gapless.
  Ahead rows_after(const InputRows& input, Range range) const {
    const int64_t bytes = in_features() * end_size();
    const int64_t rows = std::min(range.size(), input.count() - range.end);
    if (rows <= 0 || !input.even() || input.step() != bytes || input.element_step() != end_size()) return {};
    const char* const begin = input.row(range.end);
    return {begin, begin + rows * bytes};
  }
  Ahead weights_after(const C* panel, int64_t units, int64_t tiles) const {
    constexpr int64_t near_bytes = 512 << 10;
    if (bytes_ <= near_bytes) return {};
    Ahead ahead(panel, std::min(panel + units * nr, reinterpret_cast<const C*>(memory.get() + bytes_)));
    ahead.spread(units * tiles);
    return ahead;
  }

  // Activations as rows.

  void run_rows(const InputRows& input, Range range, void* output, const Scratch& scratch) const {
    Ahead ahead = rows_after(input, range);
    const int64_t m = range.size(), k = in_features();
    const S* x = nullptr;
    int64_t step = 0;
    const bool thrashes = m > 4 && input.step() % 1024 == 0 && input.step() != 0;
    if (readable(input) && input.element_step() == int64_t(sizeof(S)) && !thrashes) {
      x = reinterpret_cast<const S*>(input.row(range.begin));
      step = input.step() / int64_t(sizeof(S));
    } else {
      step = values_step(k);
      stage(input, range, step, scratch.staging);
      x = scratch.staging;
    }
    for (size_t l = 0; l < packed.size(); l++) {
      const bool last = l + 1 == packed.size();
      const PackedLayer<S>& layer = packed[l];
      const C* a = nullptr;
      int64_t a_step = step;
      if constexpr (in_itself<S>) {
        a = x;
      } else {
        a_step = units_step(layer.k);
        for (int64_t i = 0; i < m; i++) to_units(x + i * step, layer.k, scratch.units + i * a_step);
        a = scratch.units;
      }
      step = last ? layer.n : values_step(layer.n);
      S* const values = scratch.values[l % 2];
      void* out = values;
      if (last) out = static_cast<char*>(output) + range.begin * layer.n * end_size();
      rows_layer(layer, m, a, a_step, 1, out, step, last && float32_ends_, scratch.sums, ahead);
      x = values;
    }
  }

  int64_t end_size() const { return float32_ends_ ? int64_t(sizeof(float)) : int64_t(sizeof(S)); }

  void to_units(const S* row, int64_t k, C* out) const {
    if (kernels.k_unit == 1) return kernels.widen(k, row, out);
    if (k % kernels.k_unit != 0) out[k / kernels.k_unit] = C(0);
    std::memcpy(out, row, size_t(k) * sizeof(S));
  }

  // a: [m, units], at steps a_step and a_unit; out: [m, n], rows out_step apart.
  void rows_layer(const PackedLayer<S>& layer, int64_t m, const C* a, int64_t a_step, int64_t a_unit, void* out,
                  int64_t out_step, bool float32_out, C* sums, Ahead& input) const {
    const int64_t tiles = ceil_divide(m, kernels.mr);
    const int64_t wide = kernels.panels_side_by_side[ceil_divide(m, tiles) - 1] * nr;
    PanelTile<S> t;
    t.a_step = a_step;
    t.a_unit = a_unit;
    t.b_panel = layer.units * nr;
    t.sums_step = wide;
    t.row_bias = nullptr;
    t.relu = layer.activation.kind == relu_kind;
    t.output_step = out_step;
    t.output_panel = nr;
    input.spread(layer.units * tiles * ceil_divide(layer.n, wide));
    t.input_step = input.step();
    for (int64_t j = 0; j < layer.n; j += wide) {
      t.columns = std::min(wide, layer.n - j);
      for (int64_t from = 0, end; from == 0 || from < layer.units; from = end) {
        end = std::min(from + layer.step, layer.units);
        t.units = end - from;
        t.b = layer.panels + j * layer.units + from * nr;
        t.add = from > 0;
        const bool complete = end == layer.units;
        t.bias = complete && layer.bias ? layer.bias + j : nullptr;
        const bool direct = complete && layer.simple && !float32_out;
        Ahead weights = weights_after(t.b + t.units * nr, t.units, tiles);
        t.weights_step = weights.step();
        for (int64_t i = 0; i < tiles; i++) {
          const Range rows = part_of(m, 1, i, tiles);
          t.a = a + rows.begin * a_step + from * a_unit;
          t.weights_ahead = weights.next(t.units);
          t.input_ahead = input.next(t.units);
          t.sums = sums + rows.begin * wide;
          const int64_t at = rows.begin * out_step + j;
          t.output = direct ? static_cast<S*>(out) + at : nullptr;
          kernels.panel_kernel(rows.size(), t.columns)(t);
          if (complete && !direct) {
            finish(layer, t.sums, wide, rows.size(), t.columns, out, at, out_step, float32_out);
          }
        }
        if (complete) break;
      }
    }
  }

  void finish(const PackedLayer<S>& layer, const C* sums, int64_t sums_step, int64_t rows, int64_t columns, void* out,
              int64_t at, int64_t out_step, bool float32_out) const {
    if constexpr (same_type<S, BFloat16>) {
      if (float32_out) {
        return epilogue<float>(*table_.float32, layer, sums, sums_step, rows, columns, static_cast<float*>(out) + at,
                               out_step);
      }
    }
    epilogue<S>(kernels, layer, sums, sums_step, rows, columns, static_cast<S*>(out) + at, out_step);
  }

  template <class T>
  static void epilogue(const Kernels<T>& kernels, const PackedLayer<S>& layer, const C* sums, int64_t sums_step,
                       int64_t rows, int64_t columns, T* out, int64_t out_step) {
    Epilogue<T> e;
    e.tile = sums;
    e.tile_step = sums_step;
    e.rows = rows;
    e.columns = columns;
    e.sums = nullptr;
    e.sums_step = 0;
    e.output = out;
    e.pre_activation = nullptr;
    e.leading_dimension = out_step;
    e.bias = nullptr;
    e.scalars = layer.activation.scalars;
    kernels.activations[layer.activation.kind].epilogue(e);
  }

  // Activations as columns: panels of NR rows, each [units, NR].

  void run_columns(const InputRows& input, Range range, void* output, const Scratch& scratch) const {
    Ahead ahead = rows_after(input, range);
    const int64_t m = range.size(), panels = ceil_divide(m, nr), k = in_features();
    C* const first = units_place(scratch, 1);
    const bool in_place = readable(input);
    for (int64_t p = 0; p < panels; p++) {
      const Range rows{range.begin + p * nr, std::min(range.end, range.begin + (p + 1) * nr)};
      const S* x = scratch.staging;
      int64_t step = k, element_step = 1;
      if (in_place) {
        x = reinterpret_cast<const S*>(input.row(rows.begin));
        step = input.step() / int64_t(sizeof(S));
        element_step = input.element_step() / int64_t(sizeof(S));
      } else {
        stage(input, rows, k, scratch.staging);
      }
      kernels.pack_b(x, step, element_step, rows.size(), k, first + p * kernels.units(k) * nr);
    }
    const C* x = first;
    for (size_t l = 0; l < packed.size(); l++) {
      const bool last = l + 1 == packed.size();
      const PackedLayer<S>& layer = packed[l];
      if (last) {
        char* const out = static_cast<char*>(output) + range.begin * layer.n * end_size();
        return last_layer(layer, m, x, out, scratch, ahead);
      }
      S* const out = scratch.values[l % 2];
      columns_layer(layer, round_up(m, kernels.lanes), x, out, layer.n * nr, false, scratch.sums, ahead);
      if constexpr (in_itself<S>) {
        x = out;
      } else {
        for (int64_t p = 0; p < panels; p++) {
          kernels.pack_b(out + p * layer.n * nr, 1, nr, nr, layer.n, scratch.units + p * kernels.units(layer.n) * nr);
        }
        x = scratch.units;
      }
    }
  }

  C* units_place(const Scratch& scratch, int i) const {
    if constexpr (in_itself<S>) {
      return scratch.values[i];
    } else {
      return scratch.units;
    }
  }

  // Back to rows: as the result of products, or, if that would leave most of a vector empty, by copying.
  void last_layer(const PackedLayer<S>& layer, int64_t m, const C* x, char* out, const Scratch& scratch,
                  Ahead& ahead) const {
    if (layer.n >= kernels.lanes) {
      for (int64_t from = 0; from < m; from += nr) {
        const int64_t rows = std::min(nr, m - from);
        rows_layer(layer, rows, x + from * layer.units, 1, nr, out + from * layer.n * end_size(), layer.n,
                   float32_ends_, scratch.sums, ahead);
      }
    } else if (layer.n == 1) {
      columns_layer(layer, m, x, out, nr, float32_ends_, scratch.sums, ahead);
    } else {
      columns_layer(layer, round_up(m, kernels.lanes), x, scratch.last, layer.n * nr, float32_ends_, scratch.sums,
                    ahead);
      if (float32_ends_) {
        turn(scratch.last, layer.n, m, reinterpret_cast<C*>(out));
      } else {
        turn(reinterpret_cast<const S*>(scratch.last), layer.n, m, reinterpret_cast<S*>(out));
      }
    }
  }

  template <class T> void turn(const T* from, int64_t n, int64_t m, T* out) const {
    for (int64_t panel = 0; panel < m; panel += nr, from += n * nr) {
      const int64_t rows = std::min(nr, m - panel);
      for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < n; j++) *out++ = from[j * nr + i];
      }
    }
  }

  // x: panels of [units, NR]; out: panels of [n, NR], out_panel apart, of which the first m columns are written.
  void columns_layer(const PackedLayer<S>& layer, int64_t m, const C* x, void* out, int64_t out_panel, bool float32_out,
                     C* sums, Ahead& input) const {
    PanelTile<S> t;
    t.a_step = 1;
    t.a_unit = nr;
    t.b_panel = layer.units * nr;
    t.sums_step = round_up(m, nr);
    t.bias = nullptr;
    t.relu = layer.activation.kind == relu_kind;
    t.output_step = nr;
    t.output_panel = out_panel;
    input.spread(layer.units * ceil_divide(layer.n, kernels.mr) * ceil_divide(m, nr));
    t.input_step = input.step();
    for (int64_t j = 0; j < layer.n; j += nr) {
      const int64_t features = std::min(nr, layer.n - j), tiles = ceil_divide(features, kernels.mr);
      const int64_t wide = kernels.panels_side_by_side[ceil_divide(features, tiles) - 1] * nr;
      for (int64_t from = 0, end; from == 0 || from < layer.units; from = end) {
        end = std::min(from + layer.step, layer.units);
        t.units = end - from;
        t.add = from > 0;
        const bool complete = end == layer.units;
        const bool direct = complete && layer.simple && !float32_out;
        Ahead weights = weights_after(layer.panels + j * layer.units + end * nr, t.units, tiles * ceil_divide(m, wide));
        t.weights_step = weights.step();
        for (int64_t g = 0; g < m; g += wide) {
          t.columns = std::min(wide, m - g);
          t.b = x + g * layer.units + from * nr;
          for (int64_t i = 0; i < tiles; i++) {
            const Range rows = part_of(features, 1, i, tiles);
            const int64_t feature = j + rows.begin, at = g / nr * out_panel + feature * nr;
            t.a = layer.panels + j * layer.units + from * nr + rows.begin;
            t.weights_ahead = weights.next(t.units);
            t.input_ahead = input.next(t.units);
            t.row_bias = complete && layer.bias ? layer.bias + feature : nullptr;
            t.sums = sums + rows.begin * t.sums_step + g;
            t.output = direct ? static_cast<S*>(out) + at : nullptr;
            kernels.panel_kernel(rows.size(), t.columns)(t);
            if (!complete || direct) continue;
            for (int64_t p = 0; p < t.columns; p += nr) {
              finish(layer, t.sums + p, t.sums_step, rows.size(), std::min(nr, t.columns - p), out,
                     at + p / nr * out_panel, nr, float32_out);
            }
          }
        }
        if (complete) break;
      }
    }
  }

  const Kernels<S>& kernels;
  const int64_t nr;
  Memory memory;
  std::vector<PackedLayer<S>> packed;
  int64_t widest = 0;  // of the features of any layer
  double rows_cost = 0, columns_cost = 0;
};

}  // namespace

FrozenNetwork::FrozenNetwork(const KernelTable& table, const Network& network, bool float32_ends)
    : table_(table), dtype_(network.dtype), float32_ends_(float32_ends) {
  for (const Layer& layer : network.layers) {
    layers_.push_back({layer.in_features, layer.out_features, layer.bias.data != nullptr, layer.activation});
    multiply_adds_ += double(layer.in_features) * double(layer.out_features);
  }
}

std::shared_ptr<const FrozenNetwork> FrozenNetwork::pack(const KernelTable& table, const Network& network,
                                                         bool float32_ends) {
  return with_storage(network.dtype, [&](auto storage) -> std::shared_ptr<const FrozenNetwork> {
    return std::make_shared<Packed<decltype(storage)>>(table, network, float32_ends);
  });
}

std::shared_ptr<const FrozenNetwork> FrozenNetwork::packed_for(const KernelTable& table) const {
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
  return pack(table, network, float32_ends_);
}

}  // namespace fastmlp::cpu
