// How the tape of tape.h is built and replayed. Called by csrc/python/capture_build.cpp and capture_replay.cpp. Below
// autograd, autocast and views everything here runs: a recording has seen what they made of the step.
#include "tape.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <utility>

#include "../tensors/devices.h"
#include "plan.h"

namespace fastmlp {
namespace {

// What TLS excludes while operators of a tape run. They were recorded below all of these.
class BelowModes {
 private:
  at::AutoDispatchBelowADInplaceOrView below_autograd_;
  c10::impl::ExcludeDispatchKeyGuard below_autocast_{c10::autocast_dispatch_keyset};
};

// The keys that a tensor of the host has, which are others under inference_mode.
c10::DispatchKeySet host_keys() {
  static const auto keys_under = [](bool inference) {
    const c10::InferenceMode mode(inference);
    return at::empty({0}, host).key_set();
  };
  static const c10::DispatchKeySet usual = keys_under(false), inference = keys_under(true);
  return c10::InferenceMode::is_enabled() ? inference : usual;
}

// Memory of somebody else's, under a storage of ours.
c10::Storage borrowed_storage(int64_t bytes) {
  return c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes, c10::DataPtr(nullptr, host),
                                               nullptr, false);
}

at::Tensor tensor_on(const c10::Storage& storage, at::ScalarType dtype, at::IntArrayRef sizes, at::IntArrayRef strides,
                     int64_t offset) {
  at::Tensor tensor =
      at::detail::make_tensor<at::TensorImpl>(c10::Storage(storage), host_keys(), at::scalarTypeToTypeMeta(dtype));
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
  return tensor;
}

double number_in(const at::Tensor& tensor) {
  const void* const data = tensor.const_data_ptr();
  switch (tensor.scalar_type()) {
    case at::kBool:
      return *static_cast<const bool*>(data);
    case at::kLong:
      return double(*static_cast<const int64_t*>(data));
    case at::kDouble:
      return *static_cast<const double*>(data);
    case at::kFloat:
      return *static_cast<const float*>(data);
    default:
      TORCH_CHECK(false, "fastmlp: capture: a check reads ", tensor.scalar_type(), ", expected bool, int64 or a float");
  }
}

}  // namespace

int Tape::add_memory(Owner owner, int64_t bytes) {
  const c10::InferenceMode ordinary(false);
  c10::Storage storage;
  if (owner == Owner::tape) {
    storage = at::empty({bytes}, at::kByte).storage();
    own_bytes_ += bytes;
  } else {
    storage = borrowed_storage(bytes);
  }
  memories_.push_back({owner, bytes, std::move(storage), {}});
  const int index = int(memories_.size()) - 1;
  if (owner == Owner::result) fresh_.push_back(index);
  if (owner == Owner::grad) {
    own_bytes_ += bytes;
    renew(index);
  }
  return index;
}

int Tape::add_tensor(int memory, at::ScalarType dtype, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset) {
  const c10::InferenceMode ordinary(false);
  tensors_.push_back({tensor_on(memories_[size_t(memory)].storage, dtype, sizes, strides, offset), memory});
  memories_of_[tensors_.back().tensor.unsafeGetTensorImpl()] = memory;
  return int(tensors_.size()) - 1;
}

int Tape::add_external(External external) {
  externals_.push_back(std::move(external));
  return int(externals_.size()) - 1;
}

void Tape::add_call(c10::OperatorHandle operation, torch::jit::Stack arguments, std::vector<int> results,
                    std::string place) {
  Step step{Step::call};
  step.operation = operation;
  step.arguments = std::move(arguments);
  if (results.empty()) step.direct = direct_call(operation.operator_name());
  for (const int tensor : results) {
    const Owner owner = tensor < 0 ? Owner::arena : memories_[size_t(tensors_[size_t(tensor)].memory)].owner;
    step.returned.push_back({tensor, owner != Owner::arena, {}});
  }
  step.text = std::move(place);
  steps_.push_back(std::move(step));
}

int Tape::memory_of(const at::Tensor& tensor) const {
  const auto found = memories_of_.find(tensor.unsafeGetTensorImpl());
  TORCH_CHECK(found != memories_of_.end(), "fastmlp: capture: a node has a tensor that is not one of its tape");
  return found->second;
}

void Tape::add_node(std::unique_ptr<Node> node, std::string place) {
  Step step{Step::run_node};
  for (const Pointer& pointer : node->pointers()) {
    Memory& memory = memories_[size_t(memory_of(pointer.tensor))];
    memory.pointers.push_back(pointer);
    if (void* const data = memory.storage.mutable_data()) pointer.point(data);
  }
  step.node = std::move(node);
  step.text = std::move(place);
  steps_.push_back(std::move(step));
}

void Tape::add_grad(int external, int tensor) {
  Step step{Step::grad};
  step.external = external;
  if (tensor >= 0) {
    step.set = int(grads_.size());
    grads_.push_back({external, tensor, {}});
    renew(tensors_[size_t(tensor)].memory);
  }
  steps_.push_back(std::move(step));
}

void Tape::add_check(int tensor, double expected, std::string error) {
  Step step{Step::check};
  step.tensor = tensor;
  step.expected = expected;
  step.text = std::move(error);
  steps_.push_back(std::move(step));
}

void Tape::add_stop(std::string place) {
  Step step{Step::stop};
  step.text = std::move(place);
  steps_.push_back(std::move(step));
}

void Tape::finish(const std::vector<std::pair<int, int>>& lifetimes, std::vector<Result> results) {
  TORCH_CHECK(lifetimes.size() == memories_.size(), "fastmlp: capture: ", lifetimes.size(), " lifetimes of ",
              memories_.size(), " memories");
  std::vector<Piece> pieces;
  std::vector<size_t> members;
  for (size_t i = 0; i < memories_.size(); i++) {
    if (memories_[i].owner != Owner::arena) continue;
    pieces.push_back({memories_[i].bytes, lifetimes[i].first, lifetimes[i].second});
    members.push_back(i);
  }
  const ArenaPlan plan = plan_arena(pieces);
  const c10::InferenceMode ordinary(false);
  arena_bytes_ = plan.bytes;
  arena_ = at::empty({plan.bytes}, at::kByte);
  for (size_t i = 0; i < members.size(); i++)
    point(int(members[i]), static_cast<char*>(arena_.mutable_data_ptr()) + plan.offsets[i]);
  results_ = std::move(results);
}

size_t Tape::calls() const {
  return size_t(
      std::count_if(steps_.begin(), steps_.end(), [](const Step& step) { return step.operation || step.node; }));
}

size_t Tape::direct_calls() const {
  return size_t(std::count_if(steps_.begin(), steps_.end(), [](const Step& step) { return step.direct || step.node; }));
}

const at::Tensor& Tape::found(const External& external) const {
  if (external.argument >= 0) return arguments_[size_t(external.argument)];
  if (external.grad_of >= 0) return found(externals_[size_t(external.grad_of)]).grad();
  return external.held;
}

bool Tape::fits(const External& external) const {
  const at::Tensor& tensor = found(external);
  return tensor.defined() && tensor.scalar_type() == external.dtype && tensor.device() == host &&
         tensor.requires_grad() == external.requires_grad && tensor.sizes() == at::IntArrayRef(external.sizes) &&
         tensor.strides() == at::IntArrayRef(external.strides);
}

bool Tape::fits(at::TensorList arguments) {
  arguments_.assign(arguments.begin(), arguments.end());
  const bool fit = std::all_of(externals_.begin(), externals_.end(), [&](const External& one) {
    return fits(one) && (!one.starts_with_grad || *one.starts_with_grad == found(one).grad().defined());
  });
  if (!fit) arguments_.clear();
  return fit;
}

void Tape::point(int memory, void* to) const {
  const Memory& pointed = memories_[size_t(memory)];
  pointed.storage.set_data_ptr_noswap(c10::DataPtr(to, host));
  for (const Pointer& pointer : pointed.pointers) pointer.point(to);
}

void Tape::renew(int memory) {
  const c10::InferenceMode ordinary(false);
  Memory& renewed = memories_[size_t(memory)];
  renewed.own = at::empty({renewed.bytes}, at::kByte).storage();
  point(memory, renewed.own.mutable_data());
  for (Grad& grad : grads_) {
    const Member& member = tensors_[size_t(grad.tensor)];
    if (member.memory != memory) continue;
    const at::Tensor& like = member.tensor;
    grad.seen = tensor_on(renewed.own, like.scalar_type(), like.sizes(), like.strides(), like.storage_offset());
  }
}

// Gives new memory to gradients that somebody else than their leaves has, or a view of one, or that this replay reads
// as the last one left them: storages_ has what a replay reads.
void Tape::renew_held() {
  known_.assign(memories_.size(), 1);  // the tape itself
  for (const Grad& grad : grads_) {
    size_t& known = known_[size_t(tensors_[size_t(grad.tensor)].memory)];
    const at::Tensor& leaf = found(externals_[size_t(grad.external)]);
    const bool in_place = leaf.defined() && leaf.grad().is_same(grad.seen);
    const bool held = size_t(grad.seen.use_count()) > (in_place ? 2u : 1u);
    known = held ? 0 : known + (known > 0);
  }
  for (size_t i = 0; i < memories_.size(); i++) {
    if (memories_[i].owner != Owner::grad) continue;
    if (known_[i] == 0 || memories_[i].own.use_count() > known_[i]) renew(int(i));
  }
}

void Tape::refresh() {
  for (const External& external : externals_) {
    TORCH_CHECK(fits(external),
                "fastmlp: capture: a tensor of the captured function got another shape, dtype, device or requires_grad "
                "within the call");
  }
  point_externals();
}

void Tape::point_externals() {
  for (const External& external : externals_) {
    const at::Tensor& tensor = found(external);
    void* const data = external.written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
    storages_.push_back(tensor.storage());
    const c10::Storage& storage = memories_[size_t(external.memory)].storage;
    if (storage.data() != data) point(external.memory, data);
  }
}

void Tape::start() {
  storages_.clear();
  outputs_.clear();
  next_ = 0;
  // The first replays take longer than those that follow.
  measured_ = replays_++ % measured_each_ == measured_each_ / 8;
  stopped_ = nullptr;
  point_externals();
  renew_held();
  for (const int memory : fresh_) {
    const int64_t bytes = memories_[size_t(memory)].bytes;
    c10::Allocator* const allocator = c10::GetAllocator(host.type());
    outputs_.push_back(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), bytes,
                                                             allocator->allocate(size_t(bytes)), allocator, true));
    point(memory, outputs_.back().mutable_data());
  }
}

void Tape::take(Returned& returned, const at::Tensor& result, const Step& step) {
  if (returned.tensor < 0) return;
  const at::Tensor& tensor = this->tensor(returned.tensor);
  TORCH_CHECK(result.defined() && result.sizes() == tensor.sizes() && result.strides() == tensor.strides() &&
                  result.scalar_type() == tensor.scalar_type(),
              "fastmlp: capture: ", step.operation->operator_name(), " in ", step.text, " returned ",
              result.defined() ? "another shape" : "nothing", ", expected a tensor of shape ", tensor.sizes(),
              " as when it was recorded; call reset() to record again");
  if (returned.copied) {
    tensor.copy_(result);
    return;
  }
  const int64_t before = tensor.storage_offset() * int64_t(tensor.itemsize());
  point(tensors_[size_t(returned.tensor)].memory,
        static_cast<char*>(const_cast<void*>(result.const_data_ptr())) - before);
  returned.held = result;
}

void Tape::call(Step& step) {
  if (step.direct) return step.direct(step.arguments);
  stack_ = step.arguments;
  step.operation->callBoxed(stack_);
  size_t next = 0;
  if (step.returned.empty()) return;
  for (const c10::IValue& value : stack_) {
    if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) take(step.returned.at(next++), tensor, step);
    } else {
      take(step.returned.at(next++), value.isTensor() ? value.toTensor() : at::Tensor(), step);
    }
  }
}

void Tape::run(Step& step) {
  switch (step.kind) {
    case Step::call:
      return call(step);
    case Step::run_node:
      return step.node->run();
    case Step::grad: {
      at::Tensor& grad = found(externals_[size_t(step.external)]).mutable_grad();
      if (step.set < 0) {
        grad.reset();
      } else if (const at::Tensor& seen = grads_[size_t(step.set)].seen; !grad.is_same(seen)) {
        grad = seen;
      }
      return;
    }
    case Step::check:
      TORCH_CHECK_VALUE(number_in(tensor(step.tensor)) == step.expected, "fastmlp: capture: ", step.text);
      return;
    case Step::stop:
      return;
  }
}

void Tape::note(Step& step, Clock::time_point begin) {
  const int64_t nanoseconds = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
  step.nanoseconds = step.nanoseconds < 0 ? nanoseconds : std::min(step.nanoseconds, nanoseconds);
}

void Tape::end_stop() {
  if (stopped_) note(*stopped_, since_);
  stopped_ = nullptr;
}

bool Tape::run() {
  end_stop();
  const BelowModes below;
  while (next_ < steps_.size()) {
    Step& step = steps_[next_++];
    if (step.kind == Step::stop) {
      if (measured_) {
        stopped_ = &step;
        since_ = Clock::now();
      }
      return true;
    }
    if (measured_) {
      const auto begin = Clock::now();
      run(step);
      note(step, begin);
    } else {
      run(step);
    }
  }
  return false;
}

std::string Tape::name_of(const Step& step) {
  if (step.node) return step.node->name();
  if (step.kind == Step::stop) return "stop";
  return step.operation ? c10::toString(step.operation->operator_name()) : "";
}

std::vector<std::tuple<std::string, std::string, int64_t>> Tape::times() const {
  std::vector<std::tuple<std::string, std::string, int64_t>> all;
  for (const Step& step : steps_) all.emplace_back(name_of(step), step.text, step.nanoseconds);
  return all;
}

std::vector<at::Tensor> Tape::results() {
  end_stop();
  std::vector<at::Tensor> all;
  for (const Result& result : results_) {
    if (result.tensor < 0) {
      all.push_back(found(externals_[size_t(result.external)]));
      continue;
    }
    const Member& member = tensors_[size_t(result.tensor)];
    const at::Tensor& like = member.tensor;
    if (result.external >= 0) {
      const at::Tensor whole = found(externals_[size_t(result.external)]).detach();
      all.push_back(whole.as_strided(like.sizes(), like.strides(), whole.storage_offset() + like.storage_offset()));
    } else {
      const size_t index = size_t(std::find(fresh_.begin(), fresh_.end(), member.memory) - fresh_.begin());
      const c10::InferenceMode mode(result.inference);
      all.push_back(
          tensor_on(outputs_.at(index), like.scalar_type(), like.sizes(), like.strides(), like.storage_offset()));
    }
  }
  return all;
}

void Tape::end() {
  for (const External& external : externals_) {
    if (!external.counted) continue;
    const at::Tensor& tensor = found(external);
    if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  for (Step& step : steps_) {
    for (Returned& returned : step.returned) returned.held.reset();
  }
  arguments_.clear();
  storages_.clear();
  outputs_.clear();
}

}  // namespace fastmlp
