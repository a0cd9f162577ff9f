// The product declared in matrix_product.h. Called by register.cpp. Takes its scratch before it starts, and leaves all
// arithmetic to the kernels of the table.
#include "matrix_product.h"

#include "../contract/activation_info.h"
#include "../contract/storage.h"
#include "dispatch.h"
#include "gemm.h"

namespace fastmlp::cpu {
namespace {

template <class S> void multiply_as(const ProductPass& pass, int threads) {
  Product<S> p;
  p.m = pass.m;
  p.n = pass.n;
  p.k = pass.k;
  p.a.data = static_cast<const S*>(pass.a.data);
  p.a.stride = pass.a.row_stride;
  p.a.k_stride = pass.a.column_stride;
  p.b.data = static_cast<const S*>(pass.b.data);
  p.b.stride = pass.b.column_stride;
  p.b.k_stride = pass.b.row_stride;
  p.output = static_cast<S*>(pass.output);
  p.pre_activation = static_cast<S*>(pass.pre_activation);
  p.leading_dimension = pass.row_stride;
  p.bias = pass.bias;
  p.activation = pass.activation;
  p.row_sums = static_cast<S*>(pass.row_sums);
  // Chunks of a split K are written without gaps, and have neither bias nor activation.
  p.split_k = pass.row_stride == pass.n && !pass.bias.data && pass.activation.kind == identity_kind;
  multiply(active(), p, threads);
}

}  // namespace

void multiply(const ProductPass& pass, int threads) {
  with_storage(pass.dtype, [&](auto storage) { multiply_as<decltype(storage)>(pass, threads); });
}

}  // namespace fastmlp::cpu
