// How a frozen graph becomes tapes, and a batch goes through them in pieces. Called with and without the GIL.
#include "frozen_graph.h"

#include <ATen/Parallel.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <limits>
#include <string>

#include "../tensors/flattened.h"
#include "network_node.h"
#include "row_nodes.h"

namespace fastmlp {
namespace {

using Form = GraphForm;

// Pieces of full size that are worth another thread, in multiply-adds.
constexpr double worth_a_thread = 1 << 18;

// The places that a step reads, and those that it writes.
struct Used {
  std::vector<const Form::Place*> reads, writes;

  void read(const std::optional<Form::Place>& place) {
    if (place) reads.push_back(&*place);
  }
};

Used used_by(const Form::NetworkStep& step) { return {{&step.from}, {&step.to}}; }
Used used_by(const Form::SoftmaxStep& step) { return {{&step.from}, {&step.to}}; }
Used used_by(const Form::ElementStep& step) {
  Used used;
  for (const Form::Place& input : step.inputs) used.reads.push_back(&input);
  for (const auto& output : step.outputs) used.writes.push_back(&output.first);
  return used;
}
Used used_by(const Form::NormStep& step) {
  Used used{{&step.from}, {&step.to, &step.mean, &step.rstd}};
  used.read(step.weight);
  used.read(step.bias);
  return used;
}
Used used_by(const Form::Step& step) {
  return std::visit([](const auto& one) { return used_by(one); }, step);
}

// Makes the tensors of a tape.
class Places {
 public:
  Places(Tape& tape, at::ScalarType dtype, int64_t rows) : tape_(tape), dtype_(dtype), rows_(rows) {}

  at::Tensor matrix(const Form::Place& place) const {
    return add(place, {rows_, place.features}, {place.row_step, place.step});
  }
  // One element of each row.
  at::Tensor column(const Form::Place& place) const { return add(place, {rows_}, {place.row_step}); }
  // What is the same for all rows.
  std::optional<at::Tensor> line(const std::optional<Form::Place>& place) const {
    if (!place) return std::nullopt;
    return add(*place, {place->features}, {place->step});
  }

 private:
  at::Tensor add(const Form::Place& place, at::IntArrayRef sizes, at::IntArrayRef strides) const {
    return tape_.tensor(tape_.add_tensor(place.memory, dtype_, sizes, strides, place.offset));
  }

  Tape& tape_;
  const at::ScalarType dtype_;
  const int64_t rows_;
};

using Networks = std::vector<std::shared_ptr<FrozenNetwork>>;

std::unique_ptr<Node> node_of(const Form::NetworkStep& step, const Networks& networks, const Places& at) {
  return std::make_unique<NetworkNode>(networks[size_t(step.network)], at.matrix(step.from), at.matrix(step.to));
}

std::unique_ptr<Node> node_of(const Form::ElementStep& step, const Networks&, const Places& at) {
  std::vector<at::Tensor> inputs;
  for (const Form::Place& input : step.inputs) inputs.push_back(at.matrix(input));
  std::vector<ElementwiseNode::Output> outputs;
  for (const auto& [place, source] : step.outputs) outputs.push_back({at.matrix(place), source, "store", 1});
  return std::make_unique<ElementwiseNode>(inputs, step.instructions, outputs);
}

std::unique_ptr<Node> node_of(const Form::NormStep& step, const Networks&, const Places& at) {
  return std::make_unique<LayerNormNode>(at.matrix(step.from), at.line(step.weight), at.line(step.bias), step.eps,
                                         at.matrix(step.to), at.column(step.mean), at.column(step.rstd));
}

std::unique_ptr<Node> node_of(const Form::SoftmaxStep& step, const Networks&, const Places& at) {
  return std::make_unique<SoftmaxNode>(at.matrix(step.from), at.matrix(step.to), step.log);
}

}  // namespace

FrozenGraph::FrozenGraph(GraphForm form, std::vector<std::shared_ptr<FrozenNetwork>> networks)
    : form_(std::move(form)), networks_(std::move(networks)) {
  TORCH_CHECK_VALUE(!networks_.empty(), "fastmlp: a frozen graph needs at least one network, got none");
  dtype_ = networks_.front()->form().end_dtype;
  for (const auto& network : networks_) {
    TORCH_CHECK_VALUE(
        network->form().end_dtype == dtype_ && network->form().takes_arrays,
        "fastmlp: the networks of a frozen graph are of several dtypes, or not in the memory of the host");
    bytes_ += network->form().bytes;
    multiply_adds_ += network->form().multiply_adds;
  }
  check();
  for (const Form::Memory& memory : form_.memories) {
    if (memory.kind == Form::Memory::input) inputs_.push_back(memory.features);
    if (memory.kind == Form::Memory::output) outputs_.push_back(memory.features);
    if (memory.kind == Form::Memory::constant) bytes_ += int64_t(memory.value.nbytes());
  }
  TORCH_CHECK_VALUE(!inputs_.empty() && !outputs_.empty() && form_.squeezed.size() == outputs_.size(),
                    "fastmlp: a frozen graph needs inputs, and a flag for each of its outputs");
  for (size_t k = 0; k < outputs_.size(); k++) {
    TORCH_CHECK_VALUE(!form_.squeezed[k] || outputs_[k] == 1, "fastmlp: an output of a frozen graph has ", outputs_[k],
                      " features a row, and no dimension for them");
  }
  pools_.front().free.push_back(made(1));
}

void FrozenGraph::check(const Form::Place& place) const {
  TORCH_CHECK_VALUE(place.memory >= 0 && size_t(place.memory) < form_.memories.size(),
                    "fastmlp: a frozen graph has no memory ", place.memory);
  const Form::Memory& memory = form_.memories[size_t(place.memory)];
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  const bool inside = place.features > 0 && place.features <= most && place.offset >= 0 && place.offset <= most &&
                      place.step >= 0 && place.step <= most &&
                      place.offset + (place.features - 1) * place.step < memory.features;
  const bool of_rows = place.row_step == memory.features && memory.kind != Form::Memory::constant;
  TORCH_CHECK_VALUE(inside && (of_rows || (place.row_step == 0 && memory.kind == Form::Memory::constant)),
                    "fastmlp: a step of a frozen graph reaches outside of memory ", place.memory);
}

// That steps stay inside of memory, and write before others read.
void FrozenGraph::check() const {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  std::vector<bool> filled;
  auto last = Form::Memory::input;
  for (const Form::Memory& memory : form_.memories) {
    TORCH_CHECK_VALUE(memory.features > 0 && memory.features <= most, "fastmlp: a memory of a frozen graph has ",
                      memory.features, " elements a row");
    TORCH_CHECK_VALUE(memory.kind >= last, "fastmlp: the memories of a frozen graph are not in their order");
    last = memory.kind;
    const bool is_constant = memory.kind == Form::Memory::constant;
    TORCH_CHECK_VALUE(!is_constant || (memory.value.defined() && memory.value.is_contiguous() &&
                                       memory.value.numel() == memory.features && memory.value.scalar_type() == dtype_),
                      "fastmlp: a constant of a frozen graph has another size, dtype, or gaps");
    filled.push_back(memory.kind == Form::Memory::input || is_constant);
  }
  for (const Form::Step& step : form_.steps) {
    const Used used = used_by(step);
    for (const Form::Place* place : used.reads) {
      check(*place);
      TORCH_CHECK_VALUE(filled[size_t(place->memory)], "fastmlp: a step of a frozen graph reads what none has written");
    }
    for (const Form::Place* place : used.writes) {
      check(*place);
      const auto kind = form_.memories[size_t(place->memory)].kind;
      TORCH_CHECK_VALUE(kind == Form::Memory::output || kind == Form::Memory::arena,
                        "fastmlp: a step of a frozen graph writes an input or a constant");
      filled[size_t(place->memory)] = true;
    }
    const auto* network = std::get_if<Form::NetworkStep>(&step);
    TORCH_CHECK_VALUE(!network || (network->network >= 0 && size_t(network->network) < networks_.size()),
                      "fastmlp: a frozen graph has no such network");
  }
  TORCH_CHECK_VALUE(std::all_of(filled.begin(), filled.end(), [](bool one) { return one; }),
                    "fastmlp: a memory of a frozen graph is never written");
}

std::unique_ptr<Tape> FrozenGraph::made(int64_t rows) const {
  // Whatever modes and transforms the caller is in: a tape is made of ordinary memory.
  const c10::impl::ForceDispatchKeyGuard plain(c10::default_included_set, c10::default_excluded_set);
  auto tape = std::make_unique<Tape>();
  tape->measure_each(std::numeric_limits<int64_t>::max());
  const int64_t element = int64_t(c10::elementSize(dtype_));
  for (const Form::Memory& memory : form_.memories) {
    const bool planned = memory.kind == Form::Memory::arena;
    const int64_t of_rows = memory.kind == Form::Memory::constant ? 1 : rows;
    tape->add_memory(planned ? Owner::arena : Owner::outside, of_rows * memory.features * element);
  }
  const Places at(*tape, dtype_, rows);
  std::vector<std::pair<int, int>> lifetimes(form_.memories.size(), {std::numeric_limits<int>::max(), 0});
  int number = 0;
  for (const Form::Step& step : form_.steps) {
    tape->add_node(std::visit([&](const auto& one) { return node_of(one, networks_, at); }, step), "");
    const Used used = used_by(step);
    for (const auto* places : {&used.reads, &used.writes}) {
      for (const Form::Place* place : *places) {
        auto& [first, last] = lifetimes[size_t(place->memory)];
        first = std::min(first, number);
        last = std::max(last, number);
      }
    }
    number++;
  }
  for (auto& [first, last] : lifetimes) first = std::min(first, last);
  tape->finish(lifetimes, {});
  for (const size_t i : c10::irange(form_.memories.size())) {
    const Form::Memory& memory = form_.memories[i];
    if (memory.kind == Form::Memory::constant) tape->put(int(i), const_cast<void*>(memory.value.const_data_ptr()));
  }
  return tape;
}

// Rows from `begin` on, through the tape of 2^size rows.
void FrozenGraph::run_piece(const Batch& batch, int64_t begin, int size) const {
  Pool& pool = pools_[size_t(size)];
  std::unique_ptr<Tape> tape;
  {
    const std::lock_guard lock(pool.mutex);
    if (!pool.free.empty()) {
      tape = std::move(pool.free.back());
      pool.free.pop_back();
    }
  }
  if (!tape) tape = made(int64_t(1) << size);
  const int64_t element = int64_t(c10::elementSize(dtype_));
  int memory = 0;
  for (const size_t i : c10::irange(inputs_.size()))
    tape->put(memory++, const_cast<char*>(batch.inputs[i]) + begin * inputs_[i] * element);
  for (const size_t i : c10::irange(outputs_.size()))
    tape->put(memory++, static_cast<char*>(batch.outputs[i]) + begin * outputs_[i] * element);
  tape->start();
  tape->run();
  tape->end();
  const std::lock_guard lock(pool.mutex);
  pool.free.push_back(std::move(tape));
}

void FrozenGraph::run(c10::ArrayRef<StridedView> inputs, c10::ArrayRef<void*> outputs) const {
  const int64_t rows = inputs.front().rows(), element = int64_t(c10::elementSize(dtype_));
  if (rows == 0) return;
  Batch batch{{}, outputs};
  std::vector<GaplessRows> gapless;
  gapless.reserve(inputs.size());
  for (const StridedView& input : inputs) {
    gapless.emplace_back(input, element);
    batch.inputs.push_back(gapless.back().data());
  }
  const int64_t full = rows / most_rows;
  if (full > 1 && multiply_adds_ * double(most_rows) > worth_a_thread && at::get_num_threads() > 1) {
    at::parallel_for(0, full, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; i++) run_piece(batch, i * most_rows, sizes - 1);
    });
  } else {
    for (int64_t i = 0; i < full; i++) run_piece(batch, i * most_rows, sizes - 1);
  }
  int64_t begin = full * most_rows;
  for (int size = sizes - 1; size-- > 0;) {
    if (!((rows - begin) >> size & 1)) continue;
    run_piece(batch, begin, size);
    begin += int64_t(1) << size;
  }
}

std::shared_ptr<FrozenGraph> FrozenGraph::renewed() const {
  std::vector<std::shared_ptr<FrozenNetwork>> changed = networks_;
  bool any = false;
  for (auto& network : changed) {
    if (auto other = network->renewed()) {
      network = std::move(other);
      any = true;
    }
  }
  return any ? std::make_shared<FrozenGraph>(form_, std::move(changed)) : nullptr;
}

}  // namespace fastmlp
