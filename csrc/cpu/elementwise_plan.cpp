// The decisions of elementwise_plan.h. Runs when a program is made, not when it is run.
#include "elementwise_plan.h"

#include <algorithm>
#include <cstdlib>

#include "kernel_table.h"
#include "parallel.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

// Some blocks of this size, and what they are read from, lie in the first cache together.
constexpr int64_t block_bytes = 4096;
// The elements of a chunk, about.
constexpr int64_t chunk_elements = 16384, most_element_chunks = 64;
// A chunk has as many rows as outweigh a set of partial results for each column.
constexpr int64_t rows_of_a_share = 16;

using Strides = std::vector<int64_t>;

// Whether dimension a is to come after dimension b, which is before it now: the first operand that steps through both
// of them differently decides.
bool comes_after(const std::vector<const Strides*>& all, size_t before, size_t after) {
  for (const Strides* strides : all) {
    const int64_t x = std::abs((*strides)[before]), y = std::abs((*strides)[after]);
    if (x == 0 || y == 0 || x == y) continue;
    return x < y;
  }
  return false;
}

// The dimensions that have more than one element, those with long steps first.
std::vector<size_t> ordered_dims(const Strides& sizes, const std::vector<const Strides*>& all) {
  std::vector<size_t> dims;
  for (size_t d = 0; d < sizes.size(); d++) {
    if (sizes[d] == 1) continue;
    size_t place = dims.size();
    while (place > 0 && comes_after(all, dims[place - 1], d)) place--;
    dims.insert(dims.begin() + std::ptrdiff_t(place), d);
  }
  return dims;
}

ElementSteps steps_of(const ElementGrid& grid, const Strides& strides) {
  ElementSteps steps;
  steps.outer.assign(strides.begin(), strides.end() - 1);
  steps.inner = strides.back();
  steps.repeated = std::all_of(steps.outer.begin(), steps.outer.end(), [](int64_t step) { return step == 0; });
  int64_t next = 1;
  steps.gapless = grid.columns == 1 || steps.inner == next;
  next = grid.columns;
  for (size_t d = grid.outer.size(); d-- > 0;) {
    steps.gapless = steps.gapless && steps.outer[d] == next;
    next *= grid.outer[d];
  }
  return steps;
}

ElementGrid grid_of(const Strides& sizes) {
  ElementGrid grid;
  if (sizes.empty()) return grid;
  grid.columns = sizes.back();
  grid.outer.assign(sizes.begin(), sizes.end() - 1);
  for (const int64_t size : grid.outer) grid.rows *= size;
  return grid;
}

}  // namespace

ElementPlan::ElementPlan(const ElementProgram& program, int64_t element_bytes) {
  lay_out(program, element_bytes);
  registers = int(program.inputs.size() + program.instructions.size());
  last_use_.assign(size_t(registers), -1);
  const int instructions = int(program.instructions.size());
  for (int i = 0; i < instructions; i++) {
    for (const int operand : program.instructions[size_t(i)].operands) last_use_[size_t(operand)] = i;
  }
  for (const ElementOutput& output : program.outputs) last_use_[size_t(output.source)] = instructions;
  plan_inputs();
  plan_instructions(program);
  for (PlannedOutput& output : outputs) {
    output.end == ElementEnd::store ? plan_store(output) : plan_reduction(output);
  }
  plan_chunks();
  const double per_element = 10.0 * double(program.inputs.size() + program.instructions.size() + outputs.size());
  work = double(elements) * per_element;
}

// Finds the grid, and the steps of all operands in it.
void ElementPlan::lay_out(const ElementProgram& program, int64_t element_bytes) {
  std::vector<const Strides*> all;
  for (const ElementOutput& output : program.outputs) all.push_back(&output.strides);
  for (const ElementInput& input : program.inputs) all.push_back(&input.strides);
  Strides sizes;
  std::vector<Strides> joined(all.size());
  for (const size_t dim : ordered_dims(program.sizes, all)) {
    bool joins = !sizes.empty();
    for (size_t k = 0; joins && k < all.size(); k++) joins = joined[k].back() == program.sizes[dim] * (*all[k])[dim];
    if (!joins) {
      sizes.push_back(1);
      for (Strides& strides : joined) strides.push_back(0);
    }
    sizes.back() *= program.sizes[dim];
    for (size_t k = 0; k < all.size(); k++) joined[k].back() = (*all[k])[dim];
  }
  if (sizes.empty()) {
    sizes.push_back(1);
    for (Strides& strides : joined) strides.push_back(0);
  }
  grid = grid_of(sizes);
  elements = grid.rows * grid.columns;

  const int64_t most = block_bytes / element_bytes;
  if (grid.columns <= most) {
    width = grid.columns;
    block_rows = width > 0 ? std::clamp<int64_t>(grid.rows, 1, most / width) : 1;
  } else {
    width = even_block(grid.columns, most, int64_t(cache_line) / element_bytes);
    pieces = ceil_divide(grid.columns, width);
  }
  blocks = elements > 0 ? ceil_divide(grid.rows, block_rows) * pieces : 0;
  buffer_bytes = round_up(block_rows * width * element_bytes, int64_t(cache_line));

  for (size_t k = 0; k < program.outputs.size(); k++) {
    const ElementOutput& from = program.outputs[k];
    PlannedOutput& output = outputs.emplace_back();
    output.kind = from.kind;
    output.end = from.end;
    output.source = from.source;
    output.scale = from.scale;
    output.steps = steps_of(grid, joined[k]);
  }
  for (size_t k = 0; k < program.inputs.size(); k++) {
    inputs.push_back(
        {PlannedInput::gathered, program.inputs[k].kind, steps_of(grid, joined[program.outputs.size() + k])});
  }
}

void ElementPlan::plan_inputs() {
  for (size_t k = 0; k < inputs.size(); k++) {
    PlannedInput& input = inputs[k];
    const ElementSteps& steps = input.steps;
    // What becomes an output as it is must not be overwritten by another output before.
    const bool becomes_output = outputs.size() > 1 && std::any_of(outputs.begin(), outputs.end(), [&](const auto& one) {
                                  return one.source == int(k);
                                });
    const bool in_run = steps.gapless || (steps.inner == 1 && block_rows == 1);
    if (input.kind == ElementKind::number && in_run && !becomes_output) {
      input.access = PlannedInput::in_place;
    } else if (steps.repeated && (pieces == 1 || steps.inner == 0)) {
      input.access = PlannedInput::once;
    }
  }
}

// Gives each register that needs one a buffer, which others get when nobody reads it any more. What is the same in all
// blocks keeps its own.
void ElementPlan::plan_instructions(const ElementProgram& program) {
  std::vector<bool> constant(size_t(registers), false);
  std::vector<int> buffer_of(size_t(registers), -1), free;
  const auto take = [&] {
    if (free.empty()) return buffers++;
    const int buffer = free.back();
    free.pop_back();
    return buffer;
  };
  for (size_t k = 0; k < inputs.size(); k++) {
    constant[k] = inputs[k].access == PlannedInput::once;
    if (constant[k]) inputs[k].buffer = buffers++;
  }
  for (size_t i = 0; i < program.instructions.size(); i++) {
    const std::vector<int>& operands = program.instructions[i].operands;
    constant[inputs.size() + i] =
        std::all_of(operands.begin(), operands.end(), [&](int operand) { return constant[size_t(operand)]; });
  }
  for (size_t k = 0; k < inputs.size(); k++) {
    if (inputs[k].access == PlannedInput::gathered) inputs[k].buffer = buffer_of[k] = buffers++;
  }
  for (size_t i = 0; i < program.instructions.size(); i++) {
    const ElementInstruction& from = program.instructions[i];
    const size_t result = inputs.size() + i;
    PlannedInstruction planned{from.operation, {0, 0, 0}, int(result), -1, from.scalars};
    std::copy(from.operands.begin(), from.operands.end(), planned.operands);
    if (constant[result]) {
      planned.buffer = buffers++;
      once.push_back(planned);
      continue;
    }
    for (const int operand : from.operands) {
      int& buffer = buffer_of[size_t(operand)];
      if (buffer >= 0 && last_use_[size_t(operand)] == int(i)) {
        free.push_back(buffer);
        buffer = -1;
      }
    }
    planned.buffer = take();
    if (last_use_[result] < 0) {
      free.push_back(planned.buffer);  // nobody reads it
    } else {
      buffer_of[result] = planned.buffer;
    }
    each.push_back(planned);
  }
}

void ElementPlan::plan_store(PlannedOutput& output) {
  const bool in_run = output.steps.gapless || (output.steps.inner == 1 && block_rows == 1);
  const int producer = output.source - int(inputs.size());  // negative for an input
  const bool made =
      producer < 0
          ? inputs[size_t(output.source)].access == PlannedInput::gathered
          : std::any_of(each.begin(), each.end(), [&](const auto& one) { return one.result == output.source; });
  const bool first = std::none_of(outputs.begin(), outputs.end(), [&](const PlannedOutput& other) {
    return other.direct && other.source == output.source;
  });
  output.direct = output.kind == ElementKind::number && in_run && made && first;
  if (!output.direct) return;
  for (size_t k = 0; k < inputs.size(); k++) {
    const PlannedInput& input = inputs[k];
    if (input.kind != ElementKind::number || input.access == PlannedInput::once || int(k) == output.source) continue;
    // A buffer is filled at the beginning of a block, after those before it.
    const int read_until = input.access == PlannedInput::in_place ? last_use_[k] : -1;
    if (read_until > producer || (producer < 0 && last_use_[k] >= 0)) output.apart.push_back(int(k));
  }
}

void ElementPlan::plan_reduction(PlannedOutput& output) {
  const ElementSteps& steps = output.steps;
  Strides sizes, strides;
  output.partial = steps;
  for (size_t d = 0; d < grid.outer.size(); d++) {
    if (steps.outer[d] == 0) continue;
    sizes.push_back(grid.outer[d]);
    strides.push_back(steps.outer[d]);
  }
  if (steps.inner != 0) {
    sizes.push_back(grid.columns);
    strides.push_back(steps.inner);
  }
  const bool rows_kept = sizes.size() == grid.outer.size() && steps.inner == 0;
  if (sizes.empty()) {
    output.pattern = PlannedOutput::all;
  } else if (rows_kept) {
    output.pattern = PlannedOutput::each_row;
  } else {
    output.pattern = steps.repeated ? PlannedOutput::each_column : PlannedOutput::mixed;
  }
  int64_t next = 1;
  if (steps.inner != 0) {
    output.partial.inner = next;
    next *= grid.columns;
  }
  for (size_t d = grid.outer.size(); d-- > 0;) {
    if (steps.outer[d] == 0) continue;
    output.partial.outer[d] = next;
    next *= grid.outer[d];
  }
  output.partials = next;
  if (sizes.empty()) strides.push_back(0);
  output.kept = grid_of(sizes);
  output.kept_steps = steps_of(output.kept, strides);
}

void ElementPlan::plan_chunks() {
  int64_t most = std::clamp<int64_t>(elements / chunk_elements, 1, most_element_chunks);
  for (const PlannedOutput& output : outputs) {
    if (output.end == ElementEnd::store) continue;
    if (output.pattern == PlannedOutput::mixed) most = 1;
    if (output.pattern == PlannedOutput::each_row) chunk_unit = pieces;
    if (output.pattern == PlannedOutput::each_column)
      most = std::min(most, std::max<int64_t>(1, grid.rows / rows_of_a_share));
  }
  chunks = std::clamp<int64_t>(blocks / chunk_unit, 1, most);
  for (PlannedOutput& output : outputs) {
    if (output.pattern == PlannedOutput::all || output.pattern == PlannedOutput::each_column) output.shares = chunks;
  }
}

}  // namespace fastmlp::cpu
