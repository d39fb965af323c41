// Projections of single heads. Only for layers.cpp to include.

// A lone token waits for memory: it asks for the weights that come after so many bytes, of this head or the next.
constexpr int64_t BYTES_AFTER = 4 << 10;

template <class T>
static inline void ask_after(const T* weights, int64_t count) {
  const char* bytes = reinterpret_cast<const char*>(weights) + BYTES_AFTER;
  for (int64_t at = 0; at < count * int64_t(sizeof(T)); at += 64) __builtin_prefetch(bytes + at);
}

// ROWS tokens times one output of one head: a dot product along the inputs, which lie side by side, in four sums.
template <class T, int ROWS>
static inline void dot_of_inputs(const HeadLinearArgs& a, const T* x, const T* weight, T* out) {
  constexpr int64_t STEP = 4 * W;
  vf sums[ROWS][4] = {};
  const auto add = [&](int64_t i, int part, const auto& take) {
    const vf column = take(weight + i);
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) sums[m][part] = fma_of(take(x + m * a.x_token_stride + i), column, sums[m][part]);
  };
  int64_t i = 0;
  for (; i + STEP <= a.num_inputs; i += STEP) {
    if (ROWS == 1) ask_after(weight + i, STEP);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) add(i + part * W, part, [](const T* from) { return load(from); });
  }
  for (int part = 0; i < a.num_inputs; i += W, ++part)
    add(i, part, [&](const T* from) { return load_up_to(from, a.num_inputs - i); });
  for (int m = 0; m < ROWS; ++m) {
    const vf sum = splat(sum_of((sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3])));
    store_part(out + m * a.out_token_stride, sum, 1);
  }
}

// ROWS tokens times VECS vectors of outputs of one head, whose weights lie with outputs beside one another.
template <class T, int ROWS, int VECS>
static inline void outer_tile(const HeadLinearArgs& a, const T* x, const T* weight, T* out, int64_t left) {
  constexpr int64_t INPUTS = 128;
  float inputs[ROWS][INPUTS];
  vf sums[ROWS][VECS] = {};
  for (int64_t begin = 0; begin < a.num_inputs; begin += INPUTS) {
    const int64_t count = a.num_inputs - begin < INPUTS ? a.num_inputs - begin : INPUTS;
    for (int m = 0; m < ROWS; ++m)
      for (int64_t i = 0; i < count; i += W)
        store(inputs[m] + i, load_up_to(x + m * a.x_token_stride + begin + i, count - i));
    for (int64_t i = 0; i < count; ++i) {
      const T* row = weight + (begin + i) * a.weight_column_stride;
      vf columns[VECS];
#pragma GCC unroll 4
      for (int n = 0; n < VECS; ++n) columns[n] = load_up_to(row + n * W, left - n * W);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < VECS; ++n) sums[m][n] = fma_of(splat(inputs[m][i]), columns[n], sums[m][n]);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < VECS; ++n) store_up_to(out + m * a.out_token_stride + n * W, sums[m][n], left - n * W);
}

template <class T, int ROWS>
static void outer_rows(const HeadLinearArgs& a, const T* x, const T* weight, T* out, int64_t first, int64_t end) {
  constexpr int VECS = W == 16 ? 4 : 2;
  int64_t n = first;
  for (; n + VECS * W <= end; n += VECS * W) outer_tile<T, ROWS, VECS>(a, x, weight + n, out + n, end - n);
  for (; n < end; n += W) outer_tile<T, ROWS, 1>(a, x, weight + n, out + n, end - n);
}

constexpr int64_t OUTPUTS_AT_ONCE = 512;

// The same for a lone token, to the same bits: one input after the other, so that memory is read front to back, in one
// stream, as its own prefetchers like it. The sums lie in the first cache.
template <class T>
static void outer_row(const HeadLinearArgs& a, const T* x, const T* weight, T* out, int64_t count) {
  alignas(64) float sums[OUTPUTS_AT_ONCE] = {};
  const int64_t whole = count / W * W;
  for (int64_t i = 0; i < a.num_inputs; ++i) {
    const T* row = weight + i * a.weight_column_stride;
    const vf input = splat(load_part(x + i, 1)[0]);
    const auto add = [&](int64_t n, vf column) { store(sums + n, fma_of(input, column, load(sums + n))); };
    for (int64_t n = 0; n < whole; n += 2 * W) {
      ask_after(row + n, 2 * W);
      add(n, load(row + n));
      if (n + W < whole) add(n + W, load(row + n + W));
    }
    if (whole < count) add(whole, load_part(row + whole, int(count - whole)));
  }
  for (int64_t n = 0; n < count; n += W) store_up_to(out + n, load(sums + n), count - n);
}

template <class T, int ROWS>
static void rows_of(const HeadLinearArgs& a, const T* x, const T* weight, T* out, int64_t first, int64_t end) {
  if (a.weight_column_stride == 1) {
    for (int64_t n = first; n < end; ++n) dot_of_inputs<T, ROWS>(a, x, weight + n * a.weight_row_stride, out + n);
  } else if constexpr (ROWS == 1) {
    outer_row<T>(a, x, weight + first, out + first, end - first);
  } else {
    outer_rows<T, ROWS>(a, x, weight, out, first, end);
  }
}

template <class T>
static void head_linear_of(const HeadLinearArgs& a) {
  const int64_t step = a.weight_column_stride == 1 ? 64 : OUTPUTS_AT_ONCE;  // outputs of a unit of work
  const int64_t steps = (a.num_outputs + step - 1) / step, units = a.heads * steps;
  const int threads = threads_of(units, a.tokens * a.heads * a.num_outputs * a.num_inputs);
  const auto work = [&](int64_t unit) {
    const int64_t head = unit / steps, first = unit % steps * step;
    const int64_t end = first + step < a.num_outputs ? first + step : a.num_outputs;
    const T* x = static_cast<const T*>(a.x) + head * a.x_head_stride;
    const T* weight = static_cast<const T*>(a.weight) + head * a.weight_head_stride;
    T* out = static_cast<T*>(a.out) + head * a.out_head_stride;
    int64_t t = 0;
    for (; t + 4 <= a.tokens; t += 4)
      rows_of<T, 4>(a, x + t * a.x_token_stride, weight, out + t * a.out_token_stride, first, end);
    for (; t < a.tokens; ++t) rows_of<T, 1>(a, x + t * a.x_token_stride, weight, out + t * a.out_token_stride, first, end);
  };
  by_parts(a.team, threads > 1, units, work);
}

static void head_linear(const HeadLinearArgs& a) {
  if (a.dtype == DType::f32) return head_linear_of<float>(a);
  if (a.dtype == DType::bf16) return head_linear_of<bf16>(a);
  head_linear_of<f16>(a);
}
