// Softmax of narrow rows, its logarithm, and their gradients. Included by kernels.inl inside an ISA's namespace and
// target region, after math.inl; must not include anything. As many rows as a vector has lanes are transposed, so that
// each lane is a row.

template <class S> struct Softmax {
  using M = Math<S>;
  using V = typename M::V;
  static constexpr int lanes = M::lanes;

  // Rows of a matrix, transposed: lane l of column c is in row l. Lanes without a row hold zeros.
  struct Block {
    S x[most_softmax_columns * lanes] = {};

    void load(int rows, int64_t n, const S* from) {
      for (int l = 0; l < rows; l++) {
        for (int64_t c = 0; c < n; c++) x[c * lanes + l] = from[l * n + c];
      }
    }
    void store(int rows, int64_t n, S* to) const {
      for (int l = 0; l < rows; l++) {
        for (int64_t c = 0; c < n; c++) to[l * n + c] = x[c * lanes + l];
      }
    }
    V get(int64_t c) const { return M::load(x + c * lanes); }
    void set(int64_t c, V v) { M::store(x + c * lanes, v); }
  };

  static void forward_rows(int rows, int64_t n, bool log, const S* input, S* output) {
    Block block;
    block.load(rows, n, input);
    V most = block.get(0);
    for (int64_t c = 1; c < n; c++) {
      const V next = block.get(c);
      most = next > most ? next : most;
    }
    V sum = {};
    for (int64_t c = 0; c < n; c++) {
      const V d = block.get(c) - most, e = M::exp(d);
      sum += e;
      block.set(c, log ? d : e);
    }
    const V by = log ? M::log_of_one_up(sum) : sum;
    for (int64_t c = 0; c < n; c++) block.set(c, log ? block.get(c) - by : block.get(c) / by);
    block.store(rows, n, output);
  }

  static V gradient(bool log, V g, V y, V sum) { return log ? g - M::exp(y) * sum : y * (g - sum); }

  static void backward_rows(int rows, int64_t n, bool log, const S* grad, const S* output, S* grad_input) {
    Block g, y;
    g.load(rows, n, grad);
    y.load(rows, n, output);
    V sum = {};
    for (int64_t c = 0; c < n; c++) sum += log ? g.get(c) : g.get(c) * y.get(c);
    for (int64_t c = 0; c < n; c++) g.set(c, gradient(log, g.get(c), y.get(c), sum));
    g.store(rows, n, grad_input);
  }

  static void forward(const SoftmaxPass& pass, int64_t begin, int64_t end) {
    const int64_t n = pass.shape.columns;
    for (int64_t from = begin; from < end; from += lanes) {
      const int rows = end - from < lanes ? int(end - from) : lanes;
      const S* x = static_cast<const S*>(pass.input) + from * n;
      S* y = static_cast<S*>(pass.output) + from * n;
      forward_rows(rows, n, pass.log, x, y);
    }
  }

  static void backward(const SoftmaxBackwardPass& pass, int64_t begin, int64_t end) {
    const int64_t n = pass.shape.columns;
    for (int64_t from = begin; from < end; from += lanes) {
      const int rows = end - from < lanes ? int(end - from) : lanes;
      const S *g = static_cast<const S*>(pass.grad) + from * n, *y = static_cast<const S*>(pass.output) + from * n;
      S* to = static_cast<S*>(pass.grad_input) + from * n;
      backward_rows(rows, n, pass.log, g, y, to);
    }
  }
};
