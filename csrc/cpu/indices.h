// Passes that read or write elements by their numbers. Called by register.cpp. Where an index may be out of range, they
// return null, or the first one that is, and then have written nothing. The bits of a result do not depend on the
// threads.
#pragma once

#include "../contract/indices.h"

namespace fastmlp::cpu {

const int64_t* gather(const GatherPass& pass, int threads);
const int64_t* scatter(const ScatterPass& pass, int threads);
void row_max(const RowMaxPass& pass, int threads);
const int64_t* take_rows(const TakeRowsPass& pass, int threads);
void add_rows(const AddRowsPass& pass, int threads);
// In the calling thread alone: sums over a batch that costs less than waking another one.
const int64_t* nll(const NllPass& pass);
const int64_t* nll_backward(const NllBackwardPass& pass);

}  // namespace fastmlp::cpu
