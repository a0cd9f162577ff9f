// Runs what elementwise_plan.h plans: reads inputs, calls the kernels of one instruction after the other, and stores or
// reduces what they make. Allocates nothing but scratch, which the calling thread keeps.
#include "elementwise.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../contract/storage.h"
#include "dispatch.h"
#include "elementwise_plan.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// Calls f(i, offset) for each of `rows` rows from `row` on.
template <class F>
void for_rows(const ElementGrid& grid, const ElementSteps& steps, int64_t row, int64_t rows, const F& f) {
  if (grid.outer.empty()) return f(0, 0);
  const int64_t run = grid.outer.back(), step = steps.outer.back();
  if (grid.outer.size() == 1) {
    for (int64_t i = 0; i < rows; i++) f(i, (row + i) * step);
    return;
  }
  for (int64_t i = 0; i < rows;) {
    const int64_t within = (row + i) % run;
    int64_t offset = within * step, above = (row + i) / run;
    for (size_t d = grid.outer.size() - 1; d-- > 0; above /= grid.outer[d])
      offset += above % grid.outer[d] * steps.outer[d];
    for (const int64_t end = std::min(rows, i + run - within); i < end; i++, offset += step) f(i, offset);
  }
}

int64_t row_offset(const ElementGrid& grid, const ElementSteps& steps, int64_t row) {
  if (grid.outer.size() == 1) return row * steps.outer[0];
  int64_t found = 0;
  for_rows(grid, steps, row, 1, [&](int64_t, int64_t offset) { found = offset; });
  return found;
}

double fold(ElementEnd end, double a, double b) {
  if (end == ElementEnd::sum) return a + b;
  if (std::isnan(a) || std::isnan(b)) return a + b;
  return end == ElementEnd::max ? std::max(a, b) : std::min(a, b);
}

// A part of the grid: some rows, or a piece of one.
struct Block {
  int64_t row, column, rows, columns;
  int64_t size() const { return rows * columns; }
};

// As much as the caches that lie nearest can spare for each of many programs: this much is a program's own, and saves
// it the way to that of the thread.
constexpr size_t most_own_bytes = 1024;

// Numbers of 16 bits that lie apart are brought together, this many at a time, before they become others.
constexpr int64_t side_by_side = 64;

template <class T> class Runner final : public ElementwiseRun {
 public:
  Runner(const ElementProgram& program, int (*threads)())
      : plan_(program, int64_t(sizeof(T))),
        threads_(threads),
        direct_(plan_.outputs.size()),
        padded_(size_t(plan_.registers), true) {
    registers_bytes_ = round_up(int64_t(sizeof(T*)) * plan_.registers, int64_t(cache_line));
    slot_bytes_ = size_t(registers_bytes_ + plan_.buffer_bytes * plan_.buffers);
    for (const PlannedOutput& output : plan_.outputs) {
      places_.push_back(partial_bytes_);
      if (output.end == ElementEnd::store) continue;
      partial_bytes_ +=
          size_t(round_up(int64_t(sizeof(double)) * output.partials * output.shares, int64_t(cache_line)));
    }
    const size_t bytes = partial_bytes_ + slot_bytes_;
    if (plan_.chunks == 1 && bytes <= most_own_bytes) own_ = std::make_unique<Line[]>(bytes / cache_line);
  }

  void run(void* const* memory) override {
    const KernelTable& table = active();
    table.mark();
    Pass pass{table, kernels_of<T>(table), memory, memory + plan_.inputs.size(), own_ ? own_[0].bytes : nullptr};
    for (size_t k = 0; k < plan_.outputs.size(); k++) {
      direct_[k] = is_direct(pass, k);
      if (plan_.outputs[k].direct) padded_[size_t(plan_.outputs[k].source)] = !direct_[k];
    }
    if (own_) return run(pass, 1);
    const int threads = plan_.chunks > 1 ? useful_threads(plan_.work, threads_()) : 1;
    const Workspace scratch(partial_bytes_ + slot_bytes_ * size_t(threads));
    pass.partials = scratch.data();
    run(pass, threads);
  }

 private:
  // Whether numbers of this dtype are computed in T.
  template <class S> static constexpr bool computes = std::is_same_v<Compute<S>, T>;

  struct Pass {
    const KernelTable& table;
    const Kernels<T>& kernels;
    void* const* inputs;
    void* const* outputs;
    char* partials;  // and then a slot for each thread: pointers to registers, and buffers
  };
  struct alignas(cache_line) Line {
    char bytes[cache_line];
  };

  void run(const Pass& pass, int threads) const {
    begin_partials(pass);
    run_tasks(plan_.chunks, threads, [&](int64_t chunk, int slot) {
      run_chunk(pass, chunk, pass.partials + partial_bytes_ + slot_bytes_ * size_t(slot));
    });
    for (size_t k = 0; k < plan_.outputs.size(); k++) finish(pass, k);
  }

  double* partials(const Pass& pass, size_t k) const { return reinterpret_cast<double*>(pass.partials + places_[k]); }
  const ElementFolds<T>& folds(const Pass& pass, ElementEnd end) const {
    return pass.kernels.element_folds[int(end) - int(ElementEnd::sum)];
  }

  void begin_partials(const Pass& pass) const {
    for (size_t k = 0; k < plan_.outputs.size(); k++) {
      const PlannedOutput& output = plan_.outputs[k];
      if (output.end == ElementEnd::store) continue;
      std::fill_n(partials(pass, k), output.partials * output.shares, folds(pass, output.end).start);
    }
  }

  Block block_at(int64_t index) const {
    if (plan_.pieces == 1) {
      const int64_t row = index * plan_.block_rows;
      return {row, 0, std::min(plan_.block_rows, plan_.grid.rows - row), plan_.grid.columns};
    }
    const int64_t column = index % plan_.pieces * plan_.width;
    return {index / plan_.pieces, column, 1, std::min(plan_.width, plan_.grid.columns - column)};
  }

  void run_chunk(const Pass& pass, int64_t chunk, char* slot) const {
    T** const registers = reinterpret_cast<T**>(slot);
    T* const buffers = reinterpret_cast<T*>(slot + registers_bytes_);
    const auto buffer = [&](int index) { return buffers + index * (plan_.buffer_bytes / int64_t(sizeof(T))); };
    const Range range =
        plan_.chunks == 1 ? Range{0, plan_.blocks} : part_of(plan_.blocks, plan_.chunk_unit, chunk, plan_.chunks);
    if (range.size() == 0) return;
    const Block all{0, 0, plan_.block_rows, plan_.width};
    for (size_t k = 0; k < plan_.inputs.size(); k++) {
      const PlannedInput& input = plan_.inputs[k];
      if (input.access == PlannedInput::in_place) continue;
      registers[k] = buffer(input.buffer);
      if (input.access == PlannedInput::once) gather(pass, k, all, registers[k]);
    }
    for (const PlannedInstruction& one : plan_.once) {
      registers[one.result] = buffer(one.buffer);
      execute(pass, one, all.size(), registers);
    }
    for (const PlannedInstruction& one : plan_.each) registers[one.result] = buffer(one.buffer);
    for (int64_t index = range.begin; index < range.end; index++) run_block(pass, block_at(index), chunk, registers);
  }

  void run_block(const Pass& pass, const Block& block, int64_t chunk, T** registers) const {
    for (size_t k = 0; k < plan_.outputs.size(); k++) {
      const PlannedOutput& output = plan_.outputs[k];
      if (direct_[k]) registers[output.source] = in_place(output.steps, pass.outputs[k], block);
    }
    for (size_t k = 0; k < plan_.inputs.size(); k++) {
      const PlannedInput& input = plan_.inputs[k];
      if (input.access == PlannedInput::in_place) {
        registers[k] = in_place(input.steps, pass.inputs[k], block);
      } else if (input.access == PlannedInput::gathered) {
        gather(pass, k, block, registers[k]);
      }
    }
    for (const PlannedInstruction& one : plan_.each) execute(pass, one, block.size(), registers);
    for (size_t k = 0; k < plan_.outputs.size(); k++) {
      if (!direct_[k]) end_block(pass, k, block, chunk, registers[plan_.outputs[k].source]);
    }
  }

  // Whether an output is computed where it is to lie.
  bool is_direct(const Pass& pass, size_t k) const {
    const PlannedOutput& output = plan_.outputs[k];
    return output.direct && std::none_of(output.apart.begin(), output.apart.end(),
                                         [&](int input) { return pass.inputs[input] == pass.outputs[k]; });
  }

  void execute(const Pass& pass, const PlannedInstruction& one, int64_t n, T* const* registers) const {
    pass.kernels.elements[one.operation](n, registers[one.operands[0]], registers[one.operands[1]],
                                         registers[one.operands[2]], registers[one.result], padded_[size_t(one.result)],
                                         one.scalars);
  }

  T* in_place(const ElementSteps& steps, void* data, const Block& block) const {
    T* const begin = static_cast<T*>(data);
    if (steps.gapless) return begin + block.row * plan_.grid.columns + block.column;
    return begin + row_offset(plan_.grid, steps, block.row) + block.column;
  }

  void gather(const Pass& pass, size_t k, const Block& block, T* to) const {
    const PlannedInput& input = plan_.inputs[k];
    const void* const data = pass.inputs[k];
    switch (input.kind) {
      case ElementKind::number:
        return gather_from(input.steps, static_cast<const T*>(data), block, to);
      case ElementKind::boolean:
        return gather_from(input.steps, static_cast<const bool*>(data), block, to);
      case ElementKind::integer:
        return gather_from(input.steps, static_cast<const int64_t*>(data), block, to);
      case ElementKind::bfloat16:
        return widen_from(pass, input.steps, static_cast<const BFloat16*>(data), block, to);
      case ElementKind::float16:
        return widen_from(pass, input.steps, static_cast<const Float16*>(data), block, to);
    }
  }

  template <class S>
  void widen_from(const Pass& pass, const ElementSteps& steps, const S* data, const Block& block, T* to) const {
    if constexpr (computes<S>) {
      const int64_t n = block.columns, step = steps.inner;
      const auto widen = kernels_of<S>(pass.table).widen;
      for_rows(plan_.grid, steps, block.row, block.rows, [&](int64_t i, int64_t offset) {
        const S* const from = data + offset + block.column * step;
        T* const row = to + i * n;
        if (step == 1) return widen(n, from, row);
        if (step == 0) {
          widen(1, from, row);
          std::fill_n(row, n, T(row[0]));
          return;
        }
        S some[side_by_side];
        for (int64_t j = 0; j < n; j += side_by_side) {
          const int64_t count = std::min(side_by_side, n - j);
          for (int64_t l = 0; l < count; l++) some[l] = from[(j + l) * step];
          widen(count, some, row + j);
        }
      });
    }
  }

  template <class X> void gather_from(const ElementSteps& steps, const X* data, const Block& block, T* to) const {
    const int64_t n = block.columns, step = steps.inner;
    for_rows(plan_.grid, steps, block.row, block.rows, [&](int64_t i, int64_t offset) {
      const X* const from = data + offset + block.column * step;
      T* const row = to + i * n;
      if (step == 0) {
        std::fill_n(row, n, T(*from));
      } else if (step == 1) {
        if (from != static_cast<const void*>(row)) std::copy_n(from, n, row);
      } else {
        for (int64_t j = 0; j < n; j++) row[j] = T(from[j * step]);
      }
    });
  }

  void end_block(const Pass& pass, size_t k, const Block& block, int64_t chunk, const T* from) const {
    const PlannedOutput& output = plan_.outputs[k];
    if (output.end != ElementEnd::store) return reduce(pass, k, block, chunk, from);
    void* const data = pass.outputs[k];
    switch (output.kind) {
      case ElementKind::boolean:
        return scatter(output.steps, static_cast<bool*>(data), block, from);
      case ElementKind::bfloat16:
        return narrow_to(pass, output.steps, static_cast<BFloat16*>(data), block, from);
      case ElementKind::float16:
        return narrow_to(pass, output.steps, static_cast<Float16*>(data), block, from);
      default:
        return scatter(output.steps, static_cast<T*>(data), block, from);
    }
  }

  template <class S>
  void narrow_to(const Pass& pass, const ElementSteps& steps, S* data, const Block& block, const T* from) const {
    if constexpr (computes<S>) {
      const int64_t n = block.columns, step = steps.inner;
      const auto narrow = kernels_of<S>(pass.table).narrow;
      for_rows(plan_.grid, steps, block.row, block.rows, [&](int64_t i, int64_t offset) {
        S* const to = data + offset + block.column * step;
        const T* const row = from + i * n;
        if (step == 1) return narrow(n, row, to);
        S some[side_by_side];
        for (int64_t j = 0; j < n; j += side_by_side) {
          const int64_t count = std::min(side_by_side, n - j);
          narrow(count, row + j, some);
          for (int64_t l = 0; l < count; l++) to[(j + l) * step] = some[l];
        }
      });
    }
  }

  template <class X> void scatter(const ElementSteps& steps, X* data, const Block& block, const T* from) const {
    const int64_t n = block.columns, step = steps.inner;
    for_rows(plan_.grid, steps, block.row, block.rows, [&](int64_t i, int64_t offset) {
      X* const to = data + offset + block.column * step;
      const T* const row = from + i * n;
      if (to == static_cast<const void*>(row)) return;
      if (step == 1) {
        std::copy_n(row, n, to);
      } else {
        for (int64_t j = 0; j < n; j++) to[j * step] = X(row[j]);
      }
    });
  }

  void reduce(const Pass& pass, size_t k, const Block& block, int64_t chunk, const T* from) const {
    const PlannedOutput& output = plan_.outputs[k];
    const ElementFolds<T>& by = folds(pass, output.end);
    double* const into = partials(pass, k) + (output.shares > 1 ? chunk * output.partials : 0);
    switch (output.pattern) {
      case PlannedOutput::all:
        return by.rows(1, block.size(), from, into);
      case PlannedOutput::each_row:
        return by.rows(block.rows, block.columns, from, into + block.row);
      case PlannedOutput::each_column:
        return by.columns(block.rows, block.columns, from, into + block.column);
      case PlannedOutput::mixed:
        return reduce_mixed(output, by, block, from, into);
    }
  }

  // Rows one after the other that share partial results, or whose partial results lie so, are reduced together.
  void reduce_mixed(const PlannedOutput& output, const ElementFolds<T>& by, const Block& block, const T* from,
                    double* into) const {
    const bool kept = output.partial.inner != 0;
    const int64_t step = kept ? 0 : 1;
    int64_t first = 0, count = 0, place = 0;
    const auto fold_rows = [&] {
      if (count == 0) return;
      (kept ? by.columns : by.rows)(count, block.columns, from + first * block.columns, into + place);
    };
    for_rows(plan_.grid, output.partial, block.row, block.rows, [&](int64_t i, int64_t offset) {
      const int64_t at = kept ? offset + block.column : offset;
      if (count > 0 && at == place + count * step) {
        count++;
        return;
      }
      fold_rows();
      first = i;
      count = 1;
      place = at;
    });
    fold_rows();
  }

  // Adds the partial results of chunks in their order, and writes what they make.
  void finish(const Pass& pass, size_t k) const {
    const PlannedOutput& output = plan_.outputs[k];
    if (output.end == ElementEnd::store || (plan_.elements == 0 && output.end != ElementEnd::sum)) return;
    double* const first = partials(pass, k);
    for (int64_t share = 1; share < output.shares; share++) {
      for (int64_t i = 0; i < output.partials; i++)
        first[i] = fold(output.end, first[i], first[share * output.partials + i]);
    }
    const double scale = output.end == ElementEnd::sum ? output.scale : 1;
    const int64_t n = output.kept.columns;
    for_rows(output.kept, output.kept_steps, 0, output.kept.rows, [&](int64_t i, int64_t offset) {
      for (int64_t j = 0; j < n; j++) put(pass, k, offset + j * output.kept_steps.inner, T(first[i * n + j] * scale));
    });
  }

  void put(const Pass& pass, size_t k, int64_t place, T value) const {
    void* const data = pass.outputs[k];
    if constexpr (computes<BFloat16>) {
      const ElementKind kind = plan_.outputs[k].kind;
      if (kind == ElementKind::bfloat16)
        return pass.table.bfloat16->narrow(1, &value, static_cast<BFloat16*>(data) + place);
      if (kind == ElementKind::float16)
        return pass.table.float16->narrow(1, &value, static_cast<Float16*>(data) + place);
    }
    static_cast<T*>(data)[place] = value;
  }

  const ElementPlan plan_;
  int (*const threads_)();
  std::vector<char> direct_;  // of each output, in this run
  std::vector<char> padded_;  // of each register: whether it lies in a buffer
  std::unique_ptr<Line[]> own_;
  int64_t registers_bytes_ = 0;
  size_t slot_bytes_ = 0, partial_bytes_ = 0;
  std::vector<size_t> places_;  // of the partial results of each output
};

}  // namespace

std::unique_ptr<ElementwiseRun> plan_elements(const ElementProgram& program, int (*threads)()) {
  if (program.dtype == DType::float64) return std::make_unique<Runner<double>>(program, threads);
  return std::make_unique<Runner<float>>(program, threads);
}

}  // namespace fastmlp::cpu
