// Enters the CPU into the table of devices and its operators into the dispatcher. The only file of the device that
// knows torch: tensors become pointers here, and memory for results and the number of threads are torch's. What all
// devices do alike is in operations.h. Must not compute: network.h, step.h and frozen.h do, with pointers.
#include <ATen/CPUFunctions.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "../contract/training_info.h"
#include "../tensors/derivatives.h"
#include "../tensors/devices.h"
#include "../tensors/dtypes.h"
#include "../tensors/frozen_network.h"
#include "../tensors/operations.h"
#include "clip.h"
#include "derivatives.h"
#include "dispatch.h"
#include "elementwise.h"
#include "draws.h"
#include "frozen.h"
#include "indices.h"
#include "matrix_product.h"
#include "network.h"
#include "rows.h"
#include "step.h"
#include "workspace.h"

namespace fastmlp::cpu {
namespace {

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Not initialised. Past the dispatcher, which would find the same.
at::Tensor allocate(at::IntArrayRef sizes, at::ScalarType dtype) {
  at::Tensor tensor = at::detail::empty_cpu(sizes, dtype);
  prefer_huge_pages(tensor.data_ptr(), tensor.nbytes());
  return tensor;
}

struct Device {
  static constexpr const char* name = "CPU";
  static constexpr c10::DispatchKey backend = c10::DispatchKey::CPU, autograd = c10::DispatchKey::AutogradCPU,
                                    autocast = c10::DispatchKey::AutocastCPU;

  static at::Tensor empty(at::IntArrayRef sizes, const at::Tensor& like) { return allocate(sizes, like.scalar_type()); }

  static void run(const ForwardPass& pass, const at::Tensor&) { cpu::forward(pass, threads()); }
  static void run(const BackwardPass& pass, const at::Tensor&) { cpu::backward(pass, threads()); }

  static at::Tensor mask(at::IntArrayRef sizes, double dropped);
};

using Cpu = Operations<Device>;

// Random numbers.

using Drawn = BernoulliDraw::Element;

void draw_from(const std::optional<at::Generator>& given, const BernoulliDraw& all) {
  if (all.n == 0) return;
  auto* const generator =
      at::get_generator_or_default<at::CPUGeneratorImpl>(given, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(generator->mutex_);
  at::mt19937 engine = generator->engine();
  at::mt19937_data_pod data = engine.data();
  static_assert(sizeof data.state_ == sizeof Twister::words);
  Twister twister;
  std::memcpy(twister.words, data.state_.data(), sizeof twister.words);
  // Torch counts the words that are left, and one more. After seeding none is, though `next_` is 0.
  twister.used = Twister::size + 1 - data.left_;
  draw(all, twister);
  std::memcpy(data.state_.data(), twister.words, sizeof twister.words);
  data.left_ = Twister::size + 1 - twister.used;
  data.next_ = uint32_t(twister.used);
  engine.set_data(data);
  generator->set_engine(engine);
}

void bernoulli(const at::Tensor& tensor, double p, const std::optional<at::Generator>& generator) {
  const at::ScalarType dtype = tensor.scalar_type();
  const Drawn element = dtype == at::kByte ? Drawn::byte : dtype == at::kFloat ? Drawn::float32 : Drawn::float64;
  draw_from(generator, {element, tensor.numel(), tensor.mutable_data_ptr(), p});
}

// Torch's operator may draw otherwise: on other processors, or in another release. Compared on generators of their own.
bool same_draws(at::ScalarType dtype, double p, int64_t n, uint64_t seed) {
  at::Generator torchs = at::detail::createCPUGenerator(seed), ours = at::detail::createCPUGenerator(seed);
  for (at::CPUGeneratorImpl* generator :
       {at::check_generator<at::CPUGeneratorImpl>(torchs), at::check_generator<at::CPUGeneratorImpl>(ours)}) {
    // Seeds of one parity begin within a block of words, at its second one.
    if (seed % 2 == 1) generator->random();
  }
  at::Tensor expected = allocate({n}, dtype), found = allocate({n}, dtype);
  at::cpu::bernoulli_(expected, p, torchs);
  bernoulli(found, p, ours);
  return std::memcmp(expected.const_data_ptr(), found.const_data_ptr(), found.nbytes()) == 0 &&
         at::cpu::equal(at::Tensor(torchs.get_state()), at::Tensor(ours.get_state()));
}

bool compare_draws() {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kByte}) {
    for (const double p : {0.0, 0.1, 0.5, 0.9, 1.0}) {
      for (const int64_t n : {1, 7, 311, 312, 2000}) {
        for (const uint64_t seed : {0, 1, 20, 4711}) {
          if (!same_draws(dtype, p, n, seed)) return false;
        }
      }
    }
  }
  return true;
}

bool draws_as_torch() {
  static const bool same = compare_draws();
  return same;
}

// Memory for what is drawn for layers that drop.
void carve_masks(Network& network, Carver& carver) {
  for (Layer& layer : network.layers) {
    if (layer.drops()) layer.dropout.kept = carver.take<uint8_t>(network.rows * layer.out_features);
  }
}

// By torch's own operator where ours draws otherwise. The numbers do not depend on the dtype. Torch draws nothing where
// everything is dropped.
void draw_mask(uint8_t* kept, int64_t n, double dropped) {
  const double p = 1 - dropped;
  if (p == 0) {
    std::fill_n(kept, n, uint8_t(0));
  } else if (draws_as_torch()) {
    draw_from(std::nullopt, {Drawn::byte, n, kept, p});
  } else if (n > 0) {
    at::Tensor mask = at::from_blob(kept, {n}, at::kByte);
    at::cpu::bernoulli_(mask, p);
  }
}

at::Tensor Device::mask(at::IntArrayRef sizes, double dropped) {
  at::Tensor mask = allocate(sizes, at::kByte);
  draw_mask(mask.mutable_data_ptr<uint8_t>(), mask.numel(), dropped);
  return mask;
}

// Layer by layer, in the order in which torch draws in a forward pass.
void draw_masks(const Network& network) {
  for (const Layer& layer : network.layers) {
    if (layer.drops()) draw_mask(layer.dropout.kept, network.rows * layer.out_features, layer.dropout.p);
  }
}

// Training.

void check_classes(const at::Tensor& target, const LossSpec& spec, int64_t columns) {
  const int64_t* const all = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); i++) {
    TORCH_CHECK_INDEX(all[i] == spec.ignore_index || (all[i] >= 0 && all[i] < columns), "fastmlp: target holds class ",
                      all[i], ", expected 0 to ", columns - 1, ", or the loss's ignore_index, ", spec.ignore_index);
  }
}

void check_probabilities(const at::Tensor& target) {
  const auto check = [&](auto zero) {
    const auto* const all = target.const_data_ptr<decltype(zero)>();
    for (int64_t i = 0; i < target.numel(); i++) {
      TORCH_CHECK(all[i] >= 0 && all[i] <= 1, "fastmlp: target holds ", all[i], ", expected numbers between 0 and 1");
    }
  };
  target.scalar_type() == at::kFloat ? check(0.0f) : check(0.0);
}

at::Tensor train_into(const Stack& stack, const at::Tensor& input, at::TensorList parameters, const LossSpec& spec,
                      const at::Tensor& target, const at::Tensor& weight, c10::ArrayRef<NormTensors> norms,
                      at::TensorList grads, at::Tensor& memory) {
  StepTensors tensors = step_pass(Device::name, stack, input, parameters, spec, target, weight, norms, grads);
  Network& network = tensors.pass.backward.network;
  const LossInfo& info = loss_info(spec.kind);
  if (info.takes_classes) check_classes(target, spec, network.layers.back().out_features);
  if (info.takes_probabilities) check_probabilities(target);
  Carver masks;
  carve_masks(network, masks);
  const int64_t bytes = int64_t(train_bytes(tensors.pass)), all = bytes + int64_t(masks.used());
  if (all > 0 && (!memory.defined() || memory.numel() < all)) memory = allocate({all}, at::kByte);
  at::Tensor result = allocate({}, input.scalar_type());
  if (masks.used() > 0) {
    Carver carver(static_cast<char*>(memory.data_ptr()) + bytes);
    carve_masks(network, carver);
    draw_masks(network);
  }
  const std::optional<double> trained = train(tensors.pass, bytes > 0 ? memory.data_ptr() : nullptr, threads());
  if (!trained) return {};
  const double loss = *trained;
  if (input.scalar_type() == at::kFloat) {
    *result.mutable_data_ptr<float>() = float(loss);
  } else {
    *result.mutable_data_ptr<double>() = loss;
  }
  return result;
}

void update_all(const std::vector<Update>& updates, c10::Device) { update(updates, threads()); }

std::unique_ptr<ElementwiseRun> plan_elementwise(const ElementProgram& program) {
  return plan_elements(program, &threads);
}

// Frozen networks.

// A network of frozen.h behind the interface of all devices.
class HostNetwork final : public FrozenNetwork {
 public:
  HostNetwork(Form form, std::shared_ptr<const PackedNetwork> packed)
      : FrozenNetwork(std::move(form)), packed_(std::move(packed)) {}

  at::Tensor empty(at::IntArrayRef sizes) const override { return allocate(sizes, form().end_dtype); }

  void run(const FrozenBatch& batch) const override {
    const StridedView& x = batch.input;
    packed_->run({x.data, x.dims - 1, x.sizes, x.steps, x.steps[x.dims - 1]}, batch.output, threads());
  }

  Parameters parameters() const override {
    const at::ScalarType dtype = form().dtype;
    const at::ScalarType of_sums = c10::elementSize(dtype) == 2 ? at::kFloat : dtype;
    Parameters all;
    for (size_t l = 0; l < form().layers.size(); l++) {
      all.weights.push_back(at::empty({form().features[l + 1], form().features[l]}, dtype));
      all.biases.emplace_back();
      if (form().layers[l].has_bias) all.biases.back() = at::empty({form().features[l + 1]}, of_sums);
      packed_->unpack(l, all.weights.back().data_ptr(), all.biases.back() ? all.biases.back()->data_ptr() : nullptr);
    }
    return all;
  }

  std::shared_ptr<FrozenNetwork> renewed() const override {
    const KernelTable& now = active();
    if (&packed_->table() == &now) return nullptr;
    auto packed = packed_->packed_for(now);
    Form changed = form();
    changed.bytes = packed->bytes();
    return std::make_shared<HostNetwork>(std::move(changed), std::move(packed));
  }

 private:
  const std::shared_ptr<const PackedNetwork> packed_;
};

std::shared_ptr<FrozenNetwork> freeze(const Stack& stack, const FrozenNetwork::Parameters& parameters,
                                      const FrozenEnds& ends) {
  const auto& [weights, biases] = parameters;
  const at::ScalarType dtype = weights.front().scalar_type();
  Network network;
  network.dtype = *dtype_of(dtype);
  for (size_t l = 0; l < weights.size(); l++) {
    const at::Tensor& weight = weights[l];
    Layer& layer = network.layers.emplace_back();
    layer.in_features = weight.size(1);
    layer.out_features = weight.size(0);
    layer.weight = {weight.data_ptr(), weight.stride(0), weight.stride(1)};
    layer.activation = stack.activation(l);
    if (biases[l]) layer.bias = {biases[l]->data_ptr(), biases[l]->stride(0)};
  }
  auto packed = PackedNetwork::pack(active(), network, ends);
  HostNetwork::Form form{
      .layers = stack.specs().vec(),
      .features = features_of(weights),
      .device = weights.front().device(),
      .dtype = dtype,
      .end_dtype = ends.float32 ? at::kFloat : dtype,
      .head = ends.head,
      .bytes = packed->bytes(),
      .takes_arrays = true,
      .multiply_adds = packed->multiply_adds(),
  };
  return std::make_shared<HostNetwork>(std::move(form), std::move(packed));
}

// Instruction sets.

template <class S> InstructionSet::Sizes sizes_of(const Kernels<S>& kernels) {
  return {{"MR", kernels.mr},
          {"NR", kernels.nr},
          {"MC", kernels.mc},
          {"NC", kernels.nc},
          {"KC", kernels.kc},
          {"chain", kernels.chain},
          {"lanes", kernels.lanes},
          {"stream_rows", kernels.stream_rows},
          {"stream_columns", kernels.stream_columns}};
}

std::vector<InstructionSet> all_sets() {
  std::vector<InstructionSet> all;
  for (const KernelTable* table : tables()) {
    all.push_back({table->name,
                   table->description,
                   supported(*table),
                   {{"float32", sizes_of(*table->float32)},
                    {"float64", sizes_of(*table->float64)},
                    {"bfloat16", sizes_of(*table->bfloat16)},
                    {"float16", sizes_of(*table->float16)}}});
  }
  return all;
}

std::vector<std::string> supported_by(const std::array<uint64_t, 4>& words) {
  const unsigned features = decode_features({uint32_t(words[0]), uint32_t(words[1]), uint32_t(words[2]), words[3]});
  std::vector<std::string> names;
  for (const KernelTable* table : tables()) {
    if ((table->needs & ~features) == 0) names.emplace_back(table->name);
  }
  return names;
}

constexpr InstructionSets instruction_sets = {&all_sets, [] { return active().name; }, &set_active,
                                              [] { return last_isa; }, &supported_by};

const RegisterDevice registered(c10::kCPU, [] {
  DeviceOperations all = Cpu::entry();
  all.train_into = &train_into;
  all.update = &update_all;
  all.gradient_norm = [](const std::vector<Gradient>& all, NormOrder order) {
    return gradient_norm(all, order, threads());
  };
  all.scale_gradients = [](const std::vector<Gradient>& all, double by) { scale_gradients(all, by, threads()); };
  all.clamp_gradients = [](const std::vector<Gradient>& all, double limit) { clamp_gradients(all, limit, threads()); };
  all.derivatives = [](const DerivativesForward& pass) { derivatives(pass, threads()); };
  all.derivatives_backward = [](const DerivativesBackward& pass) { derivatives_backward(pass, threads()); };
  all.multiply = [](const ProductPass& pass) { multiply(pass, threads()); };
  all.elementwise = &plan_elementwise;
  all.freeze = &freeze;
  all.bernoulli = &bernoulli;
  all.draws_as_torch = &draws_as_torch;
  all.layer_norm = [](const LayerNormPass& pass) { layer_norm(pass, threads()); };
  all.layer_norm_backward = [](const LayerNormBackwardPass& pass) { layer_norm_backward(pass, threads()); };
  all.batch_norm = [](const BatchNormPass& pass) { batch_norm(pass, threads()); };
  all.batch_norm_backward = [](const BatchNormBackwardPass& pass) { batch_norm_backward(pass, threads()); };
  all.softmax = [](const SoftmaxPass& pass) { softmax(pass, threads()); };
  all.softmax_columns = &softmax_columns;
  all.softmax_backward = [](const SoftmaxBackwardPass& pass) { softmax_backward(pass, threads()); };
  all.gather = [](const GatherPass& pass) { return gather(pass, threads()); };
  all.scatter = [](const ScatterPass& pass) { return scatter(pass, threads()); };
  all.row_max = [](const RowMaxPass& pass) { row_max(pass, threads()); };
  all.take_rows = [](const TakeRowsPass& pass) { return take_rows(pass, threads()); };
  all.add_rows = [](const AddRowsPass& pass) { add_rows(pass, threads()); };
  all.nll = &nll;
  all.nll_backward = &nll_backward;
  all.instruction_sets = &instruction_sets;
  return all;
}());

}  // namespace

TORCH_LIBRARY_IMPL(fastmlp, CPU, m) {
  m.impl("forward", &Cpu::forward_op);
  m.impl("infer", &Cpu::infer_op);
  m.impl("backward", &Cpu::backward_op);
  m.impl("derivatives", &derivatives_op);
  m.impl("derivatives_backward", &derivatives_backward_op);
}

}  // namespace fastmlp::cpu
