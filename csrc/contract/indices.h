// The torch-free contract of passes that read or write elements by their numbers, or find such numbers. Filled by
// capture/index_nodes.cpp, executed by cpu/indices.cpp. Numbers are float32 or float64, indices int64. What is written
// shares no memory with what is read, and lies row by row without gaps.
#pragma once

#include "problem.h"

namespace fastmlp {

// output[r, p] = input[r, index[r, p]].
struct GatherPass {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0, picks = 0;
  Matrix input;            // [rows, columns]
  Matrix index;            // [rows, picks]
  void* output = nullptr;  // [rows, picks]
};

// output is `before`; then, for p in order, output[r, index[r, p]] becomes source[r, p], or has it added.
struct ScatterPass {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0, picks = 0;
  bool adds = false;
  Matrix before;           // [rows, columns]; zeros where there is none
  Matrix index;            // [rows, picks]
  Matrix source;           // [rows, picks]
  void* output = nullptr;  // [rows, columns]
};

// The largest number of each row, and where it stands: NaN counts as the largest, and the first of equal ones is taken.
struct RowMaxPass {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0;
  Matrix input;  // [rows, columns]
  // [rows]. Null where not asked for.
  void* values = nullptr;
  void* indices = nullptr;  // int64
};

// output[p] = table[index[p]].
struct TakeRowsPass {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0, picks = 0;
  Matrix table;            // [rows, columns], with columns one after another
  Matrix index;            // [picks, 1]
  void* output = nullptr;  // [picks, columns]
};

// output[i] is the sum of the rows source[p] for which index[p] is i, in their order. `skipped` is an index whose rows
// are left out, as are those out of range.
struct AddRowsPass {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0, picks = 0;
  int64_t skipped = -1;
  Matrix source;           // [picks, columns]
  Matrix index;            // [picks, 1]
  void* output = nullptr;  // [rows, columns]
};

// Classes of rows: target[r] is one of the columns, or `ignored`. A mean is over the rows that are not.
struct ClassesPass {
  DType dtype = DType::float32;
  int64_t rows = 0, columns = 0;
  int64_t ignored = -100;
  bool mean = false;
  Matrix target;  // [rows, 1]
};

// loss = -sum of input[r, target[r]], or its mean; total = how many rows are not ignored.
struct NllPass {
  ClassesPass classes;
  Matrix input;                            // [rows, columns]
  void *loss = nullptr, *total = nullptr;  // a number each
};

struct NllBackwardPass {
  ClassesPass classes;
  const void *grad = nullptr, *total = nullptr;  // a number each
  void* grad_input = nullptr;                    // [rows, columns]
};

}  // namespace fastmlp
