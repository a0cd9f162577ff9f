// Elementwise programs: instructions that are carried out for every element of a space of indices, on operands that are
// broadcast to it, with results that are stored or reduced. Torch-free: csrc/capture/elementwise_node.cpp describes a
// program, a device plans it (cpu/elementwise.h) and runs it as often as it is asked to.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "problem.h"

namespace fastmlp {

struct ElementOperation {
  std::string name;
  int operands, scalars;
  bool float32_only = false;
};

// The index of an operation is its number.
const std::vector<ElementOperation>& element_operations();

// What elements are in memory: numbers of the dtype that is computed in, or what becomes such numbers. Booleans, which
// are bytes, are true where a number is not 0. Those of 16 bits are computed in float32 and rounded when they are
// stored.
enum class ElementKind { number, boolean, integer, bfloat16, float16 };

// What becomes of the elements of a register that share an element of the output: there is one of each that is stored.
enum class ElementEnd { store, sum, max, min };

// An input of a program. Strides count elements, and are 0 in dimensions that it is broadcast along.
struct ElementInput {
  ElementKind kind = ElementKind::number;
  std::vector<int64_t> strides;
};

// Strides are 0 in dimensions that are reduced. Booleans are stored only.
struct ElementOutput {
  ElementKind kind = ElementKind::number;
  std::vector<int64_t> strides;
  int source = 0;  // a register
  ElementEnd end = ElementEnd::store;
  double scale = 1;  // a sum is multiplied by it
};

struct ElementInstruction {
  int operation = 0;
  std::vector<int> operands;  // registers
  Scalars scalars;
};

// Registers are numbered through: the inputs come first, then what instructions make, each of earlier ones.
struct ElementProgram {
  DType dtype = DType::float32;  // float32 or float64: numbers are of it, and it is computed in
  std::vector<int64_t> sizes;
  std::vector<ElementInput> inputs;
  std::vector<ElementInstruction> instructions;
  std::vector<ElementOutput> outputs;
};

// A program that a device is ready to run. An output may lie where an input of the same strides does; other than that
// outputs share memory with nothing.
class ElementwiseRun {
 public:
  ElementwiseRun() = default;
  ElementwiseRun(const ElementwiseRun&) = delete;
  ElementwiseRun& operator=(const ElementwiseRun&) = delete;
  virtual ~ElementwiseRun() = default;

  // The memory of the inputs and then of the outputs. At most one thread at a time may run a program.
  virtual void run(void* const* memory) = 0;
};

}  // namespace fastmlp
