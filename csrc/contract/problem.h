// The torch-free contract between the register files and the kernels of every device: what a
// network is, and which raw pointers one forward or backward pass reads and writes. A linear
// layer is a network of one layer. Nothing here allocates tensors or checks arguments, because
// tensors/passes.cpp, which fills these structs, is called after the checks of tensors/checks.h.
#pragma once

#include <cstdint>
#include <vector>

namespace fastmlp {

enum class DType { float32, float64, bfloat16, float16 };

// Sixteen bits as they lie in memory; float32 is what they are computed in.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The parameters of an activation, in the order in which its struct in activation.h names them.
struct Scalars {
  double a = 0;
  double b = 0;
  bool operator==(const Scalars&) const = default;
};

// `kind` is an index into the list of activation.h.
struct ActivationSpec {
  int kind = 0;
  Scalars scalars;
  bool operator==(const ActivationSpec&) const = default;
};

// What a layer makes of its input before its activation. Layers of a run are products; in a training step there are
// also batch normalisations, and layers that leave it as it is, for an activation or a dropout that follows no layer.
enum class Map { product, batch_norm, none };

// What a layer is besides its tensors.
struct LayerSpec {
  bool has_bias = false;
  ActivationSpec activation;
  Map map = Map::product;
  bool has_weight = true;
  double dropout = 0;  // the probability with which an element is dropped after the activation
  bool operator==(const LayerSpec&) const = default;
};

// A strided vector; strides count elements and may be zero. `data` is null for "not given".
struct Vector {
  void* data = nullptr;
  int64_t stride = 0;
};

// A strided matrix; strides count elements and may be zero. `data` is null for "not given".
struct Matrix {
  void* data = nullptr;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
};

// What a frozen network makes of each row after its last layer: nothing, its softmax, or the logarithm of that.
enum class Head { none, softmax, log_softmax };

// How a frozen network begins and ends.
struct FrozenEnds {
  bool float32 = false;  // input and output are float32, for weights in bfloat16 alone
  Head head = Head::none;
};

// Batch normalisation, whose numbers are those of contract/rows.h. Vectors hold a number for each feature.
struct Normalisation {
  const void *weight = nullptr, *bias = nullptr;              // or null
  void *running_mean = nullptr, *running_variance = nullptr;  // null only if of_batch
  bool of_batch = false;                                      // else by the running statistics
  double momentum = 0, eps = 0;
  void *mean = nullptr, *rstd = nullptr;  // where forward leaves those of the batch for backward; null unless of_batch
};

// Dropout: each element times `scale` where its byte in `kept` is 1, and times zero where that is 0.
struct Dropout {
  double p = 0;  // of being dropped. 0: there is no dropout
  double scale = 1;
  uint8_t* kept = nullptr;  // [rows, out_features], row-major without gaps
};

struct Layer {
  int64_t in_features = 0;
  int64_t out_features = 0;
  Matrix weight;  // [out_features, in_features], of a product
  Vector bias;    // [out_features], of a product
  ActivationSpec activation;
  Map map = Map::product;
  Normalisation norm;
  Dropout dropout;

  bool drops() const { return dropout.p > 0; }
};

struct Network {
  DType dtype = DType::float32;
  int64_t rows = 0;  // the batch, all leading dimensions of the input flattened
  std::vector<Layer> layers;
  Matrix input;  // [rows, layers[0].in_features]
};

// What layer l keeps for backward: its output before dropout, or its pre-activation where the derivative needs
// that (keeps_output of activation.h decides). All are row-major without gaps. A first layer that is no product reads
// an input without gaps.
struct ForwardPass {
  Network network;
  // One entry a layer, each null or [rows, out_features]. The last layer's output is `output`, so
  // its own entry is given only where something else is kept. Empty: nothing is kept, and nothing is dropped; where
  // layers drop and nothing is kept, all entries are null.
  std::vector<void*> kept;
  void* output = nullptr;  // [rows, layers.back().out_features]
};

struct BackwardPass {
  Network network;
  Matrix grad_output;         // [rows, layers.back().out_features]; gapless if the last layer drops or is no product
  std::vector<Matrix> saved;  // one a layer; the last one's data may be null if it is identity
  // Where to write; null for a gradient that is not asked for. Row-major without gaps.
  void* grad_input = nullptr;       // [rows, layers[0].in_features]
  std::vector<void*> grad_weights;  // [out_features, in_features] each, [out_features] of a batch normalisation
  std::vector<void*> grad_biases;   // [out_features] each
};

}  // namespace fastmlp
