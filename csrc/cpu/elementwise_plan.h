// How the CPU goes through the space of an elementwise program: decided once, from the program alone, so that the bits
// of sums depend on nothing else. elementwise.cpp runs what is planned here. Knows nothing of dtypes but their size.
//
// Dimensions that all operands step through alike become one, and the last one is the columns of a matrix whose rows
// are all the others. A block is some whole rows, or a piece of one row where a row is longer than a block. A chunk is
// some blocks that one thread goes through, one after the other.
#pragma once

#include <cstdint>
#include <vector>

#include "../contract/elementwise.h"

namespace fastmlp::cpu {

// A matrix whose rows are numbered through some dimensions.
struct ElementGrid {
  std::vector<int64_t> outer;  // sizes of the dimensions of rows
  int64_t rows = 1, columns = 1;
};

// Where the elements of an operand lie in a grid; steps count elements.
struct ElementSteps {
  std::vector<int64_t> outer;
  int64_t inner = 0;
  bool gapless = false;   // the whole grid, row by row
  bool repeated = false;  // all rows are the same
};

struct PlannedInput {
  enum Access { in_place, gathered, once } access;  // once: into a buffer that no block changes
  ElementKind kind;
  ElementSteps steps;
  int buffer = -1;
};

struct PlannedInstruction {
  int operation;
  int operands[3];  // registers; of those that it does not have, any
  int result;       // a register
  int buffer;
  Scalars scalars;
};

struct PlannedOutput {
  ElementKind kind;
  ElementEnd end;
  int source;
  double scale;
  ElementSteps steps;
  // Of what is stored: whether it is computed where it is to lie; and inputs that must lie elsewhere then, because they
  // are still read afterwards.
  bool direct = false;
  std::vector<int> apart;
  // Of what is reduced: where partial results lie, which are gapless; how many sets of them there are; and where
  // results go.
  enum Pattern { all, each_row, each_column, mixed } pattern = all;
  ElementSteps partial;
  int64_t partials = 1, shares = 1;
  ElementGrid kept;
  ElementSteps kept_steps;
};

struct ElementPlan {
  ElementPlan(const ElementProgram& program, int64_t element_bytes);

  ElementGrid grid;
  int64_t elements = 1;
  int64_t block_rows = 1, width = 1, pieces = 1, blocks = 1;  // pieces of a row
  int64_t chunks = 1, chunk_unit = 1;                         // a chunk is a multiple of so many blocks
  std::vector<PlannedInput> inputs;
  std::vector<PlannedInstruction> once, each;  // for all blocks at once, and for each one
  std::vector<PlannedOutput> outputs;
  int registers = 0, buffers = 0;
  int64_t buffer_bytes = 0;  // whole cache lines
  double work = 0;           // in multiply-adds, about

 private:
  void lay_out(const ElementProgram& program, int64_t element_bytes);
  void plan_inputs();
  void plan_instructions(const ElementProgram& program);
  void plan_store(PlannedOutput& output);
  void plan_reduction(PlannedOutput& output);
  void plan_chunks();

  std::vector<int> last_use_;  // of each register, the instruction that reads it last
};

}  // namespace fastmlp::cpu
