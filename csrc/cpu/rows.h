// Passes over the rows of a matrix. Called by register.cpp. The bits of a result do not depend on the threads.
#pragma once

#include "../contract/rows.h"

namespace fastmlp::cpu {

void layer_norm(const LayerNormPass& pass, int threads);
void layer_norm_backward(const LayerNormBackwardPass& pass, int threads);
void batch_norm(const BatchNormPass& pass, int threads);
void batch_norm_backward(const BatchNormBackwardPass& pass, int threads);
void softmax(const SoftmaxPass& pass, int threads);
void softmax_backward(const SoftmaxBackwardPass& pass, int threads);
// Rows of more columns than this fill a vector of float32.
int64_t softmax_columns();

}  // namespace fastmlp::cpu
