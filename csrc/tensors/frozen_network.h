// A frozen network as its callers see it, whatever device it is on. csrc/python/frozen*.cpp check arguments and call
// it. A device with a form of its own for weights makes it by the entry `freeze` of its operations (devices.h), as the
// CPU does, which packs them (cpu/register.cpp); for the others it is a DeviceNetwork (frozen_device.h).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "stack.h"

namespace fastmlp {

// Where the elements of an input lie, as tensors and NumPy's arrays both have it: steps count bytes.
struct StridedView {
  static constexpr int most_dimensions = 64;

  const char* data = nullptr;
  int dims = 0;
  int64_t sizes[most_dimensions], steps[most_dimensions];

  c10::IntArrayRef shape() const { return {sizes, size_t(dims)}; }
  int64_t rows() const {
    int64_t count = 1;
    for (int d = 0; d + 1 < dims; d++) count *= sizes[d];
    return count;
  }
};

// What one call reads and writes; `output` has rows without gaps. The tensors are null for arrays.
struct FrozenBatch {
  const StridedView& input;
  void* output;
  const at::Tensor* input_tensor = nullptr;
  const at::Tensor* output_tensor = nullptr;
};

class FrozenNetwork {
 public:
  // What a network is, for as long as it lives.
  struct Form {
    std::vector<LayerSpec> layers;
    std::vector<int64_t> features;  // of the input, and of each layer's output
    c10::Device device;
    at::ScalarType dtype;      // of the weights
    at::ScalarType end_dtype;  // of input and output
    Head head;
    int64_t bytes;  // of weights and biases, as they are held
    // Whether memory of the host is enough to run, so that arrays are taken as well as tensors.
    bool takes_arrays;
    // Of one row, by which callers decide whether to keep Python's GIL meanwhile; infinite if that may never be.
    double multiply_adds;

    int64_t in_features() const { return features.front(); }
    int64_t out_features() const { return features.back(); }
  };
  struct Parameters {
    std::vector<at::Tensor> weights;
    std::vector<std::optional<at::Tensor>> biases;
  };

  virtual ~FrozenNetwork() = default;

  const Form& form() const { return form_; }
  // Memory for a result.
  virtual at::Tensor empty(at::IntArrayRef sizes) const = 0;
  virtual void run(const FrozenBatch& batch) const = 0;
  // What it was made from; copies, unless the network holds the very tensors.
  virtual Parameters parameters() const = 0;
  // The same network as the device would hold it now, after another instruction set was chosen; null if this is it.
  virtual std::shared_ptr<FrozenNetwork> renewed() const { return nullptr; }
  // Writes other values over the old ones, where graphs that captured a call find them too. False, and nothing is done,
  // if the layers are not the same but for that, or if calls that run meanwhile would meet both.
  virtual bool refill(const Stack&, const Parameters&, Head) { return false; }

 protected:
  explicit FrozenNetwork(Form form) : form_(std::move(form)) {}

 private:
  const Form form_;
};

// The features of a network with these weights, as Form has them.
std::vector<int64_t> features_of(at::TensorList weights);

// Makes a network of layers that were checked, with biases in the dtype that sums have.
using Freeze = std::shared_ptr<FrozenNetwork>(const Stack& stack, const FrozenNetwork::Parameters& parameters,
                                              const FrozenEnds& ends);

}  // namespace fastmlp
