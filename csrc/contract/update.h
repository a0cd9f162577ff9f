// The torch-free contract of an optimizer's step: what each rule reads of an optimizer's groups, which states it keeps,
// and where a parameter, its gradient and its states lie. Filled by python/optimizer.cpp, which enumerates the
// descriptions, and executed by cpu/step.cpp. Must not hold arithmetic of elements: that is in cpu/kernels/updates.inl.
#pragma once

#include "problem.h"

namespace fastmlp {

// The numbers of one parameter's step, by the names that torch.optim has for them. Each rule uses some.
struct UpdateSpec {
  int rule = 0;  // an index into Rules
  double lr = 0, weight_decay = 0, momentum = 0, dampening = 0, beta1 = 0, beta2 = 0, alpha = 0, eps = 0;
  bool maximize = false, nesterov = false, amsgrad = false, decoupled_weight_decay = false, centered = false;
  bool fused = false;
  bool first = false;  // the states are new
  // Of Adam, from its count of steps t: lr / (1 - beta1^t) and sqrt(1 - beta2^t).
  double step_size = 0, root = 1;
};

// An entry of an optimizer's groups, and where its value goes.
struct NumberEntry {
  const char* name = nullptr;
  double UpdateSpec::* place = nullptr;
  double UpdateSpec::* second = nullptr;  // of an entry that is a pair
};
struct FlagEntry {
  const char* name = nullptr;
  bool UpdateSpec::* place = nullptr;  // null: where it is set, torch's own step has to be called
};

// An entry of a parameter's state: a tensor of the parameter's form.
struct StateEntry {
  const char* name = nullptr;
  bool (*exists)(const UpdateSpec&) = nullptr;  // null: always
};

// Unused entries have no name.
struct RuleInfo {
  const char* classes[2] = {};  // of torch.optim, and of fastmlp.optim
  NumberEntry numbers[6] = {};
  FlagEntry flags[6] = {};
  StateEntry states[3] = {};
  // Torch makes all states of such a rule at the first step, of zeros, after a state `step` that counts. Of the others
  // it makes each state where it is missing, from the first gradient.
  bool counts = false;
  // Sets what depends on the number of steps, this one included; may be null.
  void (*at_step)(UpdateSpec&, double step) = nullptr;
};

struct Sgd {
  static bool has_momentum(const UpdateSpec& u) { return u.momentum != 0; }
  static constexpr RuleInfo info = {
      .classes = {"SGD"},
      .numbers = {{"lr", &UpdateSpec::lr},
                  {"weight_decay", &UpdateSpec::weight_decay},
                  {"momentum", &UpdateSpec::momentum},
                  {"dampening", &UpdateSpec::dampening}},
      .flags = {{"maximize", &UpdateSpec::maximize},
                {"nesterov", &UpdateSpec::nesterov},
                {"fused", &UpdateSpec::fused},
                {"differentiable"}},
      .states = {{"momentum_buffer", has_momentum}},
  };
};

// Kingma and Ba, Adam: A Method for Stochastic Optimization, 2015.
struct Adam {
  static bool has_maximum(const UpdateSpec& u) { return u.amsgrad; }
  static void correct_bias(UpdateSpec& u, double step) {
    u.step_size = u.lr / (1 - __builtin_pow(u.beta1, step));
    u.root = __builtin_sqrt(1 - __builtin_pow(u.beta2, step));
  }
  static constexpr RuleInfo info = {
      .classes = {"Adam", "AdamW"},
      .numbers = {{"lr", &UpdateSpec::lr},
                  {"weight_decay", &UpdateSpec::weight_decay},
                  {"betas", &UpdateSpec::beta1, &UpdateSpec::beta2},
                  {"eps", &UpdateSpec::eps}},
      .flags = {{"maximize", &UpdateSpec::maximize},
                {"amsgrad", &UpdateSpec::amsgrad},
                {"decoupled_weight_decay", &UpdateSpec::decoupled_weight_decay},
                {"fused", &UpdateSpec::fused},
                {"differentiable"},
                {"capturable"}},
      .states = {{"exp_avg"}, {"exp_avg_sq"}, {"max_exp_avg_sq", has_maximum}},
      .counts = true,
      .at_step = correct_bias,
  };
};

// Tieleman and Hinton, Lecture 6.5: RMSProp, 2012; centered: Graves, Generating Sequences With Recurrent Neural
// Networks, 2013.
struct RmsProp {
  static bool has_momentum(const UpdateSpec& u) { return u.momentum > 0; }
  static bool has_mean(const UpdateSpec& u) { return u.centered; }
  static constexpr RuleInfo info = {
      .classes = {"RMSprop"},
      .numbers = {{"lr", &UpdateSpec::lr},
                  {"weight_decay", &UpdateSpec::weight_decay},
                  {"momentum", &UpdateSpec::momentum},
                  {"alpha", &UpdateSpec::alpha},
                  {"eps", &UpdateSpec::eps}},
      .flags = {{"maximize", &UpdateSpec::maximize},
                {"centered", &UpdateSpec::centered},
                {"differentiable"},
                {"capturable"}},
      .states = {{"square_avg"}, {"momentum_buffer", has_momentum}, {"grad_avg", has_mean}},
      .counts = true,
  };
};

template <class... R> struct RuleList {
  static constexpr int size = sizeof...(R);
};

// The order is the numbering that UpdateSpec::rule uses.
using Rules = RuleList<Sgd, Adam, RmsProp>;

// All tensors are dense and lie alike, so that the i-th element of each belongs together.
struct Update {
  DType dtype = DType::float32;
  int64_t n = 0;
  void* parameter = nullptr;
  const void* grad = nullptr;
  void* state[3] = {};  // as the rule lists them; null where one does not exist
  UpdateSpec spec;
};

}  // namespace fastmlp
