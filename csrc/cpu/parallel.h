// Divides work into nearly equal ranges, and ranges among threads. Used by everything in cpu that loops over rows,
// columns or k. A sum must not be cut by the number of threads, because its bits would depend on it: such cuts follow
// from the shape alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <omp.h>

#include "../contract/shape.h"

namespace fastmlp::cpu {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The part-th of `parts` nearly equal ranges of [0, n), cut at multiples of `unit`.
inline Range part_of(int64_t n, int64_t unit, int64_t part, int64_t parts) {
  const int64_t units = ceil_divide(n, unit);
  return {std::min(n, units * part / parts * unit), std::min(n, units * (part + 1) / parts * unit)};
}

// The length of the blocks that k is cut into, of at most `most` each: equal blocks, at a multiple of `unit`, because a
// short last one wastes time, and because the longest chain of additions sets the rounding error.
inline int64_t even_block(int64_t k, int64_t most, int64_t unit = 1) {
  return k <= most ? k : round_up(ceil_divide(k, ceil_divide(k, most)), unit);
}

// A sum over the batch may be cut into chunks whose sums are added in order. A chunk is long enough to outweigh that
// addition.
constexpr int64_t most_chunks = 16, shortest_chunk = 1024;

inline int64_t chunks_of_rows(int64_t rows) { return std::clamp<int64_t>(rows / shortest_chunk, 1, most_chunks); }

// How many of `threads` are worth waking for that many multiply-adds.
inline int useful_threads(double multiply_adds, int threads) {
  // This is about 80 us of one core. Waking a thread costs only microseconds on an idle machine, but a whole time slice
  // where another process holds the core.
  constexpr double worth_a_thread = 1 << 22;
  if (threads <= 1 || omp_in_parallel()) return 1;
  return int(std::clamp(multiply_adds / worth_a_thread, 1.0, double(threads)));
}

// The same for passes over elements, each of which takes as long as some multiply-adds of a product.
inline int threads_for_elements(int64_t elements, int threads) {
  return useful_threads(16.0 * double(elements), threads);
}

// Calls run(i, slot) for i in [0, tasks), slot < threads; the calling thread alone if threads is 1.
template <class Run> void run_tasks(int64_t tasks, int threads, const Run& run) {
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) run(i, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int slot = omp_get_thread_num();
    for (int64_t i = slot; i < tasks; i += omp_get_num_threads()) run(i, slot);
  }
}

// Elements that one task reads and writes: those of a parameter, its gradient and its state fit in an L2 cache.
constexpr int64_t task_elements = 16 << 10;

// A part of something with `n` elements.
template <class T> struct Part {
  const T* whole;
  Range range;
};

// All of their elements in parts for tasks, in order; the cuts follow from the sizes alone.
template <class T> std::vector<Part<T>> parts_of(const std::vector<T>& all) {
  constexpr int64_t line_elements = 64;  // whole lines of the cache, whatever the dtype
  std::vector<Part<T>> parts;
  parts.reserve(all.size());
  for (const T& one : all) {
    const int64_t count = ceil_divide(one.n, task_elements);
    for (int64_t i = 0; i < count; i++) parts.push_back({&one, part_of(one.n, line_elements, i, count)});
  }
  return parts;
}

// Calls run(begin, end) for rows of so many elements in all, in parts for the threads that are worth it. A part's rows
// are a multiple of 64, so that no two threads write to the same line of the cache.
template <class Run> void share_rows(int64_t rows, int64_t elements, int threads, const Run& run) {
  threads = threads_for_elements(elements, threads);
  run_tasks(threads, threads, [&](int64_t i, int) {
    const Range part = part_of(rows, 64, i, threads);
    run(part.begin, part.end);
  });
}

// Adds chunks 1, 2 and so on, in this order, to chunk 0. Chunks are vectors of n values that follow each other.
template <class C> void add_chunks(C* shares, int64_t chunks, int64_t n) {
  for (int64_t c = 1; c < chunks; c++) {
    const C* share = shares + c * n;
    for (int64_t i = 0; i < n; i++) shares[i] += share[i];
  }
}

}  // namespace fastmlp::cpu
