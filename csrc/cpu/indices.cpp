// Loops over indices, and how rows are shared among threads. Called through indices.h. Baseline code: memory is what
// these wait for, and what is added or compared follows from an index, so that vectors would not help.
#include "indices.h"

#include <algorithm>

#include "parallel.h"

namespace fastmlp::cpu {
namespace {

template <class F> void with_numbers(DType dtype, const F& f) { dtype == DType::float64 ? f(double{}) : f(float{}); }

template <class T> const T& at(const Matrix& matrix, int64_t row, int64_t column) {
  return static_cast<const T*>(matrix.data)[row * matrix.row_stride + column * matrix.column_stride];
}

bool is_outside(int64_t index, int64_t size) { return uint64_t(index) >= uint64_t(size); }

// The first index outside of [0, size), or null.
const int64_t* find_outside(const Matrix& index, int64_t rows, int64_t columns, int64_t size) {
  // A column is looked at as a row, because a loop of one round costs more than its index.
  if (columns == 1 && rows > 1) return find_outside({index.data, index.column_stride, index.row_stride}, 1, rows, size);
  bool found = false;
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = 0; c < columns; c++) found |= is_outside(at<int64_t>(index, r, c), size);
  }
  for (int64_t r = 0; found && r < rows; r++) {
    for (int64_t c = 0; c < columns; c++) {
      const int64_t& one = at<int64_t>(index, r, c);
      if (is_outside(one, size)) return &one;
    }
  }
  return nullptr;
}

template <class S> void gather_rows(const GatherPass& pass, int64_t begin, int64_t end) {
  const int64_t picks = pass.picks, step = pass.index.column_stride, of_input = pass.input.column_stride;
  S* output = static_cast<S*>(pass.output) + begin * picks;
  for (int64_t r = begin; r < end; r++, output += picks) {
    const S* const input = &at<S>(pass.input, r, 0);
    const int64_t* const index = &at<int64_t>(pass.index, r, 0);
    for (int64_t p = 0; p < picks; p++) output[p] = input[index[p * step] * of_input];
  }
}

template <bool adds, class S> void scatter_rows(const ScatterPass& pass, int64_t begin, int64_t end) {
  const int64_t picks = pass.picks, step = pass.index.column_stride, of_source = pass.source.column_stride;
  S* output = static_cast<S*>(pass.output) + begin * pass.columns;
  if (!pass.before.data) std::fill_n(output, (end - begin) * pass.columns, S(0));
  for (int64_t r = begin; r < end; r++, output += pass.columns) {
    for (int64_t c = 0; pass.before.data && c < pass.columns; c++) output[c] = at<S>(pass.before, r, c);
    const S* const source = &at<S>(pass.source, r, 0);
    const int64_t* const index = &at<int64_t>(pass.index, r, 0);
    for (int64_t p = 0; p < picks; p++) {
      S& to = output[index[p * step]];
      to = adds ? to + source[p * of_source] : source[p * of_source];
    }
  }
}

template <class S> void largest_of_rows(const RowMaxPass& pass, int64_t begin, int64_t end) {
  S* const values = static_cast<S*>(pass.values);
  for (int64_t r = begin; r < end; r++) {
    S most = at<S>(pass.input, r, 0);
    int64_t place = 0;
    for (int64_t c = 1; c < pass.columns; c++) {
      const S one = at<S>(pass.input, r, c);
      // NaN is at most nothing, so that it is taken where it comes; what is NaN, and so unequal to itself, stays.
      const bool larger = !(one <= most) & (most == most);
      most = larger ? one : most;
      place = larger ? c : place;
    }
    if (values) values[r] = most;
    if (pass.indices) static_cast<int64_t*>(pass.indices)[r] = place;
  }
}

// The rows of a table are shared, so that each of its sums is one thread's, in the order of the picks.
template <class S> void add_to_rows(const AddRowsPass& pass, int64_t begin, int64_t end) {
  S* const output = static_cast<S*>(pass.output);
  std::fill(output + begin * pass.columns, output + end * pass.columns, S(0));
  const int64_t step = pass.source.column_stride;
  for (int64_t p = 0; p < pass.picks; p++) {
    const int64_t index = at<int64_t>(pass.index, p, 0);
    if (index < begin || index >= end || index == pass.skipped) continue;
    S* const to = output + index * pass.columns;
    const S* const from = &at<S>(pass.source, p, 0);
    if (step == 1) {
      for (int64_t c = 0; c < pass.columns; c++) to[c] += from[c];
    } else {
      for (int64_t c = 0; c < pass.columns; c++) to[c] += from[c * step];
    }
  }
}

template <class S> void take_rows_of(const TakeRowsPass& pass, int64_t begin, int64_t end) {
  S* const output = static_cast<S*>(pass.output);
  for (int64_t p = begin; p < end; p++)
    std::copy_n(&at<S>(pass.table, at<int64_t>(pass.index, p, 0), 0), pass.columns, output + p * pass.columns);
}

// The first class that there is not, or null.
const int64_t* find_class_outside(const ClassesPass& pass) {
  for (int64_t r = 0; r < pass.rows; r++) {
    const int64_t& one = at<int64_t>(pass.target, r, 0);
    if (one != pass.ignored && is_outside(one, pass.columns)) return &one;
  }
  return nullptr;
}

template <class S> void sum_classes(const NllPass& pass) {
  const ClassesPass& of = pass.classes;
  double sum = 0;
  int64_t count = 0;
  for (int64_t r = 0; r < of.rows; r++) {
    const int64_t target = at<int64_t>(of.target, r, 0);
    if (target == of.ignored) continue;
    sum -= double(at<S>(pass.input, r, target));
    count++;
  }
  *static_cast<S*>(pass.loss) = S(of.mean ? sum / double(count) : sum);
  *static_cast<S*>(pass.total) = S(count);
}

template <class S> void fill_classes(const NllBackwardPass& pass) {
  const ClassesPass& of = pass.classes;
  S* const output = static_cast<S*>(pass.grad_input);
  const S grad = *static_cast<const S*>(pass.grad);
  const S each = -(of.mean ? grad / *static_cast<const S*>(pass.total) : grad);
  std::fill_n(output, of.rows * of.columns, S(0));
  for (int64_t r = 0; r < of.rows; r++) {
    const int64_t target = at<int64_t>(of.target, r, 0);
    if (target != of.ignored) output[r * of.columns + target] = each;
  }
}

}  // namespace

const int64_t* gather(const GatherPass& pass, int threads) {
  if (const int64_t* const outside = find_outside(pass.index, pass.rows, pass.picks, pass.columns)) return outside;
  with_numbers(pass.dtype, [&](auto number) {
    share_rows(pass.rows, pass.rows * pass.picks, threads,
               [&](int64_t begin, int64_t end) { gather_rows<decltype(number)>(pass, begin, end); });
  });
  return nullptr;
}

const int64_t* scatter(const ScatterPass& pass, int threads) {
  if (const int64_t* const outside = find_outside(pass.index, pass.rows, pass.picks, pass.columns)) return outside;
  with_numbers(pass.dtype, [&](auto number) {
    share_rows(pass.rows, pass.rows * (pass.picks + pass.columns), threads, [&](int64_t begin, int64_t end) {
      using S = decltype(number);
      pass.adds ? scatter_rows<true, S>(pass, begin, end) : scatter_rows<false, S>(pass, begin, end);
    });
  });
  return nullptr;
}

void row_max(const RowMaxPass& pass, int threads) {
  with_numbers(pass.dtype, [&](auto number) {
    share_rows(pass.rows, pass.rows * pass.columns, threads,
               [&](int64_t begin, int64_t end) { largest_of_rows<decltype(number)>(pass, begin, end); });
  });
}

const int64_t* take_rows(const TakeRowsPass& pass, int threads) {
  if (const int64_t* const outside = find_outside(pass.index, pass.picks, 1, pass.rows)) return outside;
  with_numbers(pass.dtype, [&](auto number) {
    share_rows(pass.picks, pass.picks * pass.columns, threads,
               [&](int64_t begin, int64_t end) { take_rows_of<decltype(number)>(pass, begin, end); });
  });
  return nullptr;
}

void add_rows(const AddRowsPass& pass, int threads) {
  with_numbers(pass.dtype, [&](auto number) {
    share_rows(pass.rows, (pass.rows + pass.picks) * pass.columns, threads,
               [&](int64_t begin, int64_t end) { add_to_rows<decltype(number)>(pass, begin, end); });
  });
}

const int64_t* nll(const NllPass& pass) {
  if (const int64_t* const outside = find_class_outside(pass.classes)) return outside;
  with_numbers(pass.classes.dtype, [&](auto number) { sum_classes<decltype(number)>(pass); });
  return nullptr;
}

const int64_t* nll_backward(const NllBackwardPass& pass) {
  if (const int64_t* const outside = find_class_outside(pass.classes)) return outside;
  with_numbers(pass.classes.dtype, [&](auto number) { fill_classes<decltype(number)>(pass); });
  return nullptr;
}

}  // namespace fastmlp::cpu
