// Frozen networks: weights are packed once, then all rows of an input go through every layer in one call. Made and
// called by register.cpp with pointers; knows no tensors. A network does not change after it was packed, so
// that any number of threads may run it at once.
//
// Each element of an output is one chain of products along ascending k, which begins anew at places that K alone sets,
// and what follows is done by the same vector code for every row. So the bits of a row depend neither on the rows that
// it comes with, nor on strides, nor on the number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../contract/problem.h"
#include "dispatch.h"

namespace fastmlp::cpu {

// Where the rows of an input lie. Steps count bytes, and need be no multiple of anything.
class InputRows {
 public:
  // `sizes` and `steps` of all dimensions but the last, of which `element_step` goes from one feature to the next.
  InputRows(const void* data, int dimensions, const int64_t* sizes, const int64_t* steps, int64_t element_step);

  int64_t count() const { return count_; }
  // Whether rows lie equally far apart.
  bool even() const { return dimensions_ <= 1; }
  int64_t step() const { return dimensions_ == 0 ? 0 : steps_[0]; }
  int64_t element_step() const { return element_step_; }
  const char* row(int64_t i) const;

 private:
  static constexpr int most_dimensions = 64;  // of tensors and of NumPy arrays
  const char* data_;
  int64_t count_ = 1, element_step_;
  int dimensions_ = 0;  // after those that are one run were joined; the innermost first
  int64_t sizes_[most_dimensions], steps_[most_dimensions];
};

struct FrozenLayer {
  int64_t in_features, out_features;
  bool has_bias;
  ActivationSpec activation;
};

class PackedNetwork {
 public:
  // Packs the layers of a network, whose rows and input are ignored, for an instruction set. Biases are of the type
  // that the dtype is computed in.
  static std::shared_ptr<const PackedNetwork> pack(const KernelTable& table, const Network& network,
                                                   const FrozenEnds& ends);
  virtual ~PackedNetwork() = default;

  // `output` has rows without gaps.
  virtual void run(const InputRows& input, void* output, int threads) const = 0;
  // For each layer its weight, [out_features, in_features] without gaps, and its bias, unless null.
  virtual void unpack(size_t layer, void* weight, void* bias) const = 0;
  std::shared_ptr<const PackedNetwork> packed_for(const KernelTable& table) const;

  const KernelTable& table() const { return table_; }
  DType dtype() const { return dtype_; }
  const std::vector<FrozenLayer>& layers() const { return layers_; }
  int64_t in_features() const { return layers_.front().in_features; }
  int64_t out_features() const { return layers_.back().out_features; }
  double multiply_adds() const { return multiply_adds_; }  // for one row
  int64_t bytes() const { return bytes_; }

 protected:
  PackedNetwork(const KernelTable& table, const Network& network, const FrozenEnds& ends);

  const KernelTable& table_;
  const DType dtype_;
  const FrozenEnds ends_;
  std::vector<FrozenLayer> layers_;
  double multiply_adds_ = 0;
  int64_t bytes_ = 0;
};

}  // namespace fastmlp::cpu
