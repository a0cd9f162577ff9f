// The one body of every ISA's kernels. Each file of isa/ includes it inside its own namespace and target region, after
// it has defined Isa (the vectors) and tiles_of (the tile sizes). The rest of the library calls these functions through
// Kernels and KernelTable only. Must include nothing but its own parts, and must not use OpenMP, lambdas or standard
// templates, because two instruction sets would share the symbols that these emit. Allocates nothing.

#include "math.inl"
#include "storage.inl"
#include "losses.inl"
#include "updates.inl"
#include "elements.inl"
#include "clip.inl"
#include "draws.inl"
#include "components.inl"
#include "rows.inl"
#include "columns.inl"
#include "softmax.inl"
#include "panels.inl"
#include "dots.inl"

template <class S> struct Leaf {
  using C = Compute<S>;
  using M = Arithmetic<S>;
  using V = typename M::V;
  using F = Factors<S>;
  static constexpr Tiles size = tiles_of<S>;
  static constexpr int lanes = M::lanes;
  static constexpr int mr = size.mr;
  static constexpr int vectors = size.vectors;
  static constexpr int nr = vectors * lanes;
  static_assert(size.mc % mr == 0 && size.nc % nr == 0);

  // How many terms a sum of rows or columns adds one after another. Errors grow with the longest chain, and torch adds
  // up short ones in cascades.
  static constexpr int sum_chain = 32;

  // Stores a part of a panel's group, from lane `from` on. A whole vector may write past the group's end, where the
  // next group overwrites it; the last group is stored to its end only.
  template <int width, int from> static void store_group(C* panel, int64_t group, int64_t groups, V v) {
    constexpr int rows = width - from < lanes ? width - from : lanes;
    C* to = panel + group * width + from;
    if (rows == lanes || (from + rows == width && group + 1 < groups)) {
      M::store(to, v);
    } else {
      M::store_first(to, v, rows);
    }
  }

  // Rows that are gapless along k become columns of the panel, lanes x lanes units at a time in registers. The parts of
  // a group are written in ascending order, so that each may overrun into the next one.
  template <int width, int from>
  static void pack_along_k(const S* source, int64_t stride, int64_t count, int64_t k, C* panel) {
    constexpr int rows = width - from < lanes ? width - from : lanes;
    const int64_t groups = (k + F::k_unit - 1) / F::k_unit;
    for (int64_t group = 0; group < groups; group += lanes) {
      const int64_t p = group * F::k_unit;
      V block[lanes] = {};
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        if (from + i >= count) break;
        block[i] = F::load_along_k(source + (from + i) * stride + p, k - p);
      }
      M::transpose(block);
#pragma GCC unroll 16
      for (int q = 0; q < lanes; q++) {
        if (group + q >= groups) break;
        // The part before this one was complete when it was stored: only a group's own end may be overrun.
        if (from == 0 && rows == width) {
          store_group<width, from>(panel, group + q, groups, block[q]);
        } else if (rows == lanes) {
          M::store(panel + (group + q) * width + from, block[q]);
        } else {
          M::store_first(panel + (group + q) * width + from, block[q], rows);
        }
      }
    }
    if constexpr (from + rows < width) pack_along_k<width, from + rows>(source, stride, count, k, panel);
  }

  // Rows with strides in both directions are first copied, a few elements of each at a time.
  template <int width>
  static void pack_strided(const S* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, C* panel) {
    constexpr int64_t most = lanes * F::k_unit;
    S rows[width * most];
    for (int64_t p = 0; p < k; p += most, panel += lanes * width) {
      const int64_t left = k - p < most ? k - p : most;
      for (int64_t i = 0; i < count; i++) {
        const S* row = source + i * stride + p * k_stride;
        for (int64_t q = 0; q < left; q++) rows[i * most + q] = row[q * k_stride];
      }
      pack_along_k<width, 0>(rows, most, count, left, panel);
    }
  }

  // Packs one group of rows that are gapless across k. Where rows follow that belong to other panels, whole vectors are
  // loaded, because a load with a mask takes longer; what is too much is overwritten by the next group.
  template <int width, int from>
  static void pack_across_k(const S* source, int64_t k_stride, int64_t count, int64_t k, int64_t group, int64_t groups,
                            C* panel) {
    constexpr int rows = width - from < lanes ? width - from : lanes;
    const int64_t p = group * F::k_unit, left = count - from;
    const S* row = source + p * k_stride + from;
    if constexpr (width - from >= 2 * lanes) {
      if (left >= 2 * lanes) {
        V first, second;
        F::load_two_across_k(row, k_stride, k - p, 2 * lanes, first, second);
        M::store(panel + group * width + from, first);
        M::store(panel + group * width + from + lanes, second);
        if constexpr (width - from > 2 * lanes) {
          pack_across_k<width, from + 2 * lanes>(source, k_stride, count, k, group, groups, panel);
        }
        return;
      }
    }
    const V v = left > 0 ? F::load_across_k(row, k_stride, k - p, left) : V{};
    store_group<width, from>(panel, group, groups, v);
    if constexpr (from + rows < width) {
      pack_across_k<width, from + rows>(source, k_stride, count, k, group, groups, panel);
    }
  }

  template <int width>
  static void pack(const S* source, int64_t stride, int64_t k_stride, int64_t count, int64_t k, C* panel) {
    const int64_t groups = (k + F::k_unit - 1) / F::k_unit;
    if (stride == 1) {
      for (int64_t g = 0; g < groups; g++) pack_across_k<width, 0>(source, k_stride, count, k, g, groups, panel);
    } else if (k_stride == 1) {
      pack_along_k<width, 0>(source, stride, count, k, panel);
    } else {
      pack_strided<width>(source, stride, k_stride, count < width ? count : width, k, panel);
    }
  }

  // Adds earlier sums, bias and ReLU to the sums of a tile, as it asks for, and stores them. Each step is one branch
  // and a run of straight code.
  template <int rows, int used> [[gnu::always_inline]] static void store_tile(const Tile<S>& t, V (&sum)[rows][used]) {
    const int64_t last = t.columns - (used - 1) * lanes;
    if (t.add) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        const C* row = t.sums + i * t.sums_step;
#pragma GCC unroll 8
        for (int j = 0; j + 1 < used; j++) sum[i][j] += M::load(row + j * lanes);
        sum[i][used - 1] += load_up_to(row + (used - 1) * lanes, last);
      }
    }
    if (!t.output) return store_rows<C, rows, used>(t.sums, t.sums_step, last, sum);
    if (t.bias) {
#pragma GCC unroll 8
      for (int j = 0; j < used; j++) {
        const V bias = M::load(t.bias + j * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) sum[i][j] += bias;
      }
    }
    if (t.relu) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) sum[i][j] = Relu::value<M>(sum[i][j], Scalars{});
      }
    }
    store_rows<S, rows, used>(t.output, t.leading_dimension, last, sum);
  }

  // Stores the tile; of the last vector of each row only `last` lanes.
  template <class T, int rows, int used>
  [[gnu::always_inline]] static void store_rows(T* to, int64_t step, int64_t last, const V (&sum)[rows][used]) {
    if (last >= lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < used; j++) Storage<T>::store(to + i * step + j * lanes, sum[i][j]);
      }
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        T* row = to + i * step;
#pragma GCC unroll 8
        for (int j = 0; j + 1 < used; j++) Storage<T>::store(row + j * lanes, sum[i][j]);
        Storage<T>::store_first(row + (used - 1) * lanes, sum[i][used - 1], last);
      }
    }
  }

  struct Ahead {
    const char* line;
    int64_t step;
  };
  // Nothing to prefetch: prefetch B's panel again, so that the loop stays free of branches.
  static Ahead ahead_of(const void* from, int64_t step, const Tile<S>& t) {
    return {static_cast<const char*>(from ? from : t.b), from ? step : 0};
  }

  // Adds `units` products to each sum, and moves all pointers on. Prefetches come one by one, because a burst of them
  // would fill the core's queue and stop it.
  template <int rows, int used>
  [[gnu::always_inline]] static void multiply_panels(int64_t units, const C*& a, const C*& b, Ahead& input,
                                                     Ahead& output, V (&sum)[rows][used]) {
    for (int64_t u = 0; u < units; u++) {
      __builtin_prefetch(input.line);
      __builtin_prefetch(output.line);
      input.line += input.step;
      output.line += output.step;
      V row[used];
#pragma GCC unroll 4
      for (int j = 0; j < used; j++) row[j] = M::load(b + j * lanes);
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        const V x = F::broadcast(a + i);
#pragma GCC unroll 4
        for (int j = 0; j < used; j++) sum[i][j] = F::multiply_add(sum[i][j], x, row[j]);
      }
      a += mr;
      b += nr;
    }
  }

  // Computes only the rows and vectors of the register tile that hold anything. A chain of products ends after
  // size.chain units: its sums are set aside while the next chain begins at zero.
  template <int rows, int used> static void microkernel(const Tile<S>& t) {
    V sum[rows][used] = {};
    const C* a = t.a;
    const C* b = t.b;
    Ahead input = ahead_of(t.input_ahead, t.input_step, t), output = ahead_of(t.output_ahead, line_bytes, t);
    int64_t left = t.k < size.chain ? t.k : size.chain;
    multiply_panels<rows, used>(left, a, b, input, output, sum);
    for (left = t.k - left; left > 0; left -= size.chain) {
      V earlier[rows][used];
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < used; j++) {
          earlier[i][j] = sum[i][j];
          sum[i][j] = V{};
        }
      }
      multiply_panels<rows, used>(left < size.chain ? left : size.chain, a, b, input, output, sum);
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < used; j++) sum[i][j] += earlier[i][j];
      }
    }
    store_tile<rows, used>(t, sum);
  }

  // A tile of few rows of C, as wide as registers allow, so that B is read in long runs where it lies.
  template <int rows, int used> static void stream_kernel(const Tile<S>& t) {
    V sum[rows][used] = {};
    const C* a = t.a;
    const S* b = t.unpacked_b;
    const int64_t last = t.columns - (used - 1) * lanes;
    for (int64_t p = 0; p < t.k; p += F::k_unit) {
      V x[rows];
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) x[i] = F::broadcast(a + i);
#pragma GCC unroll 8
      for (int j = 0; j < used; j += 2) {
        V y[2];
        if (j + 1 < used) {
          const int64_t left = lanes + (j + 2 < used ? lanes : last);
          F::load_two_across_k(b + j * lanes, t.b_step, t.k - p, left, y[0], y[1]);
        } else {
          y[0] = F::load_across_k(b + j * lanes, t.b_step, t.k - p, last);
        }
#pragma GCC unroll 4
        for (int i = 0; i < rows; i++) {
          sum[i][j] = F::multiply_add(sum[i][j], x[i], y[0]);
          if (j + 1 < used) sum[i][j + 1] = F::multiply_add(sum[i][j + 1], x[i], y[1]);
        }
      }
      a += mr;
      b += F::k_unit * t.b_step;
    }
    store_tile<rows, used>(t, sum);
  }

  // Reads A where it lies: the activations of a block of rows, or its gradients, whose columns are then the rows of A.
  // `whole` says that B may be read to the end of the last vector.
  template <int rows, int used, bool whole>
  [[gnu::always_inline]] static void multiply_rows(const Tile<S>& t, V (&sum)[rows][used]) {
    constexpr int group = 4;  // rows that one pointer serves
    const int64_t last = t.columns - (used - 1) * lanes;
    const C* a[(rows + group - 1) / group];
#pragma GCC unroll 4
    for (int i = 0; i < rows; i += group) a[i / group] = t.a + i * t.a_step;
    const C* b = t.b;
    Ahead input = ahead_of(t.input_ahead, t.input_step, t), output = ahead_of(t.output_ahead, line_bytes, t);
    for (int64_t p = 0; p < t.k; p++) {
      __builtin_prefetch(input.line);
      __builtin_prefetch(output.line, 1);
      input.line += input.step;
      output.line += output.step;
      V row[used];
#pragma GCC unroll 4
      for (int j = 0; j < used; j++) {
        row[j] = whole || j + 1 < used ? M::load(b + j * lanes) : M::load_first(b + j * lanes, last);
      }
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        const V x = M::broadcast(a[i / group][i % group * t.a_step]);
#pragma GCC unroll 4
        for (int j = 0; j < used; j++) sum[i][j] += x * row[j];
      }
#pragma GCC unroll 4
      for (int i = 0; i < rows; i += group) a[i / group] += t.a_k_step;
      b += t.b_step;
    }
  }

  template <int rows, int used> static void row_kernel(const Tile<S>& t) {
    V sum[rows][used] = {};
    if (t.b_padded || t.columns >= used * lanes) {
      multiply_rows<rows, used, true>(t, sum);
    } else {
      multiply_rows<rows, used, false>(t, sum);
    }
    store_tile<rows, used>(t, sum);
  }

  static void column_sums(int64_t rows, int64_t columns, const S* x, C* sums, bool add) {
    for (int64_t j = 0; j < columns; j += lanes) {
      const int64_t left = columns - j;
      V total = {};
      for (int64_t from = 0; from < rows; from += sum_chain) {
        V part = {};
        for (int64_t i = from; i < from + sum_chain && i < rows; i++) part += load_up_to(x + i * columns + j, left);
        total += part;
      }
      store_up_to(sums + j, add ? load_up_to(sums + j, left) + total : total, left);
    }
  }

  template <int per_row, class Sequence> struct Tables;
  template <int per_row, int... i> struct Tables<per_row, typename M::template Indices<i...>> {
    static constexpr Microkernel<S> micro[] = {&microkernel<i / per_row + 1, i % per_row + 1>...};
    static constexpr Microkernel<S> row[] = {&row_kernel<i / per_row + 1, i % per_row + 1>...};
    static constexpr Microkernel<S> stream[] = {&stream_kernel<i / per_row + 1, i % per_row + 1>...};
  };
  template <int rows, int per_row>
  using TablesOf = Tables<per_row, typename M::template Counting<rows * per_row>::Type>;

  static void panel_sums(int64_t units, const C* panel, C* sums) {
    const V ones = F::ones();
    for (int i = 0; i < mr; i += lanes) {
      V total = {};
      for (int64_t from = 0; from < units; from += sum_chain) {
        V part = {};
        for (int64_t u = from; u < from + sum_chain && u < units; u++) {
          part = F::multiply_add(part, M::load(panel + u * mr + i), ones);
        }
        total += part;
      }
      // Lanes past mr hold values of the next group; the caller ignores them.
      M::store(sums + i, M::load(sums + i) + total);
    }
  }

  static void widen(int64_t n, const S* x, C* out) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) M::store(out + i, Storage<S>::load(x + i));
    if (i < n) M::store_first(out + i, Storage<S>::load_first(x + i, n - i), n - i);
  }

  static void narrow(int64_t n, const C* x, S* out) {
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) Storage<S>::store(out + i, M::load(x + i));
    if (i < n) Storage<S>::store_first(out + i, M::load_first(x + i, n - i), n - i);
  }

  // One loop over the vectors of all rows: rows of a tile are a few vectors long, and each loop begins by loading the
  // constants of the activation.
  template <class A> static void epilogue(const Epilogue<S>& arguments) {
    Epilogue<S> e = arguments;  // stores through output cannot change a copy
    int64_t j = 0;
    while (e.rows > 0 && j < e.columns) {
      const int64_t left = e.columns - j;
      V v = M::load(e.tile + j);
      if (e.sums) v += load_up_to(e.sums + j, left);
      if (e.bias) v += M::load(e.bias + j);
      if (e.pre_activation) store_up_to(e.pre_activation + j, v, left);
      store_up_to(e.output + j, A::template value<M>(v, e.scalars), left);
      j += lanes;
      if (j < e.columns) continue;
      j = 0;
      e.rows--;
      e.tile += e.tile_step;
      if (e.sums) e.sums += e.sums_step;
      e.output += e.leading_dimension;
      if (e.pre_activation) e.pre_activation += e.leading_dimension;
    }
  }

  template <class A> static void gradient(int64_t n, const S* g, const S* saved, S* out, Scalars p) {
    for (int64_t i = 0; i < n; i += lanes) {
      const V v = A::template gradient<M>(load_up_to(g + i, n - i), load_up_to(saved + i, n - i), p);
      store_up_to(out + i, v, n - i);
    }
  }

  template <class A> static void value(int64_t n, const S* pre, S* out, Scalars p) {
    for (int64_t i = 0; i < n; i += lanes) {
      store_up_to(out + i, A::template value<M>(load_up_to(pre + i, n - i), p), n - i);
    }
  }

  template <class List> struct Activation;
  template <class... A> struct Activation<ActivationList<A...>> {
    static constexpr ActivationKernels<S> rows[] = {{&epilogue<A>, &gradient<A>, &value<A>}...};
  };

  static constexpr Kernels<S> kernels() {
    Kernels<S> k{};
    k.mr = mr;
    k.nr = nr;
    k.mc = size.mc;
    k.nc = size.nc;
    k.kc = size.kc * F::k_unit;
    k.chain = size.chain * F::k_unit;
    k.lanes = lanes;
    k.k_unit = F::k_unit;
    k.stream_rows = size.stream_rows;
    k.stream_columns = size.stream_vectors * lanes;
    k.pack_a = &pack<mr>;
    k.pack_b = &pack<nr>;
    k.microkernels = TablesOf<mr, vectors>::micro;
    if constexpr (in_itself<S>) k.row_kernels = TablesOf<mr, vectors>::row;
    k.panel_kernels = Panels<S>::All::kernels;
    k.panels_side_by_side = Panels<S>::AllWidths::widths;
    k.column_sums = &column_sums;
    k.stream_kernels = TablesOf<size.stream_rows, size.stream_vectors>::stream;
    k.dot_tile = &Dots<S>::dot_tile;
    k.panel_sums = &panel_sums;
    k.widen = &widen;
    k.narrow = &narrow;
    k.activations = Activation<Activations>::rows;
    k.losses = Loss<S>::template Table<Losses>::rows;
    k.cross_entropy = &Loss<S>::cross_entropy;
    k.head = &Loss<S>::head;
    k.updates = Step<S>::template Table<Rules>::rows;
    k.clip = &Clip<S>::kernels;
    if constexpr (in_itself<S>) {
      k.elements = Elements<S>::template Table<ElementOperations, Activations>::rows;
      k.element_folds = Elements<S>::folds;
      k.bernoulli = &Draw<S>::template bernoulli<S>;
      k.bernoulli_bytes = &Draw<S>::template bernoulli<uint8_t>;
      k.drop = &Draw<S>::drop;
      k.layer_norm = &Rows<S>::layer_norm;
      k.layer_norm_backward = &Rows<S>::layer_norm_backward;
      k.batch_norm = &Columns<S>::kernels;
      k.components = Jets<S>::template Table<Activations>::rows;
      k.softmax = &Softmax<S>::forward;
      k.softmax_backward = &Softmax<S>::backward;
    }
    return k;
  }
};

static void mark() { last_isa = Isa::name; }
