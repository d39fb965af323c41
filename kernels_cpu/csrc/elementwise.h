// Norms, gated activations, rotary embedding and cache writes. Only for kernels.cpp to include, inside namespace QUIRE_ISA.

// Below this many elements the threads would cost more than they bring.
constexpr int64_t PARALLEL_ELEMENTS = 1 << 14;

template <class T>
static void rms_norm_of(const NormArgs& a) {
  const T* weight = static_cast<const T*>(a.weight);
#pragma omp parallel for schedule(static) if (a.rows * a.n > PARALLEL_ELEMENTS)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    const int64_t whole = a.n / W * W;
    const int rest = int(a.n - whole);
    vf sum{};
    if (a.residual) {  // the sum is rounded before it is normalised, as a model in this dtype does it
      T* residual = static_cast<T*>(a.residual) + row * a.residual_stride;
      for (int64_t i = 0; i < whole; i += W) {
        store(residual + i, load(residual + i) + load(x + i));
        const vf y = load(residual + i);
        sum += y * y;
      }
      if (rest) {
        store_part(residual + whole, load_part(residual + whole, rest) + load_part(x + whole, rest), rest);
        const vf y = load_part(residual + whole, rest);
        sum += y * y;
      }
      x = residual;
    } else {
      for (int64_t i = 0; i < whole; i += W) sum += load(x + i) * load(x + i);
      if (rest) sum += load_part(x + whole, rest) * load_part(x + whole, rest);
    }
    const vf factor = splat(1.0f / __builtin_sqrtf(sum_of(sum) / float(a.n) + a.eps));
    for (int64_t i = 0; i < whole; i += W) store(out + i, load(x + i) * factor * load(weight + i));
    if (rest) store_part(out + whole, load_part(x + whole, rest) * factor * load_part(weight + whole, rest), rest);
  }
}

static inline vf sigmoid_of(vf x) {
  // exp of a number that is not positive cannot overflow: sigmoid(x) = e / (1 + e) with e = exp(x) for x < 0.
  const vf magnitude = (vf)((vi)x & 0x7fffffff);
  const vf e = exp_of(-magnitude);
  return (x < vf{} ? e : splat(1.0f)) / (splat(1.0f) + e);
}

// Source: Hendrycks & Gimpel 2016, both forms.
template <Gate GATE>
static inline vf activate(vf x) {
  if constexpr (GATE == Gate::silu) return x * sigmoid_of(x);
  if constexpr (GATE == Gate::gelu_tanh) {
    const vf inner = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
    return splat(0.5f) * x * (splat(1.0f) + tanh_of(inner));
  }
  vf y;
  for (int i = 0; i < W; ++i) y[i] = 0.5f * x[i] * (1.0f + __builtin_erff(x[i] * 0.7071067811865476f));
  return y;
}

template <class T, Gate GATE>
static void gated_rows(const GateArgs& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.n > PARALLEL_ELEMENTS)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    const T* y = x + a.n;
    T* out = static_cast<T*>(a.out) + row * a.out_stride;
    int64_t i = 0;
    for (; i + W <= a.n; i += W) store(out + i, activate<GATE>(load(x + i)) * load(y + i));
    const int rest = int(a.n - i);
    if (rest) store_part(out + i, activate<GATE>(load_part(x + i, rest)) * load_part(y + i, rest), rest);
  }
}

template <class T>
static void gated_of(const GateArgs& a) {
  if (a.gate == Gate::silu) return gated_rows<T, Gate::silu>(a);
  if (a.gate == Gate::gelu_tanh) return gated_rows<T, Gate::gelu_tanh>(a);
  gated_rows<T, Gate::gelu>(a);
}

template <class T>
static inline void rotate_halves(T* x, const float* cos, const float* sin, int64_t pairs) {
  int64_t i = 0;
  for (; i + W <= pairs; i += W) {
    const vf a = load(x + i), b = load(x + pairs + i), c = load(cos + i), s = load(sin + i);
    store(x + i, a * c - b * s);
    store(x + pairs + i, b * c + a * s);
  }
  const int rest = int(pairs - i);
  if (!rest) return;
  const vf a = load_part(x + i, rest), b = load_part(x + pairs + i, rest);
  const vf c = load_part(cos + i, rest), s = load_part(sin + i, rest);
  store_part(x + i, a * c - b * s, rest);
  store_part(x + pairs + i, b * c + a * s, rest);
}

template <class T>
static inline void rotate_neighbours(T* x, const float* cos, const float* sin, int64_t pairs) {
  for (int64_t start = 0; start < pairs; start += W) {
    const int n = int(pairs - start < W ? pairs - start : W);
    T even[W] = {}, odd[W] = {};
    for (int i = 0; i < n; ++i) even[i] = x[2 * (start + i)], odd[i] = x[2 * (start + i) + 1];
    const vf a = load(even), b = load(odd), c = load_part(cos + start, n), s = load_part(sin + start, n);
    store(even, a * c - b * s);
    store(odd, b * c + a * s);
    for (int i = 0; i < n; ++i) x[2 * (start + i)] = even[i], x[2 * (start + i) + 1] = odd[i];
  }
}

template <class T>
static void rotary_of(const RotaryArgs& a) {
#pragma omp parallel for schedule(static) if (a.num_tokens * a.num_heads * a.num_pairs > PARALLEL_ELEMENTS)
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const float* cos = a.cos + token * a.cos_stride;
    const float* sin = a.sin + token * a.sin_stride;
    for (int64_t head = 0; head < a.num_heads; ++head) {
      T* x = static_cast<T*>(a.x) + token * a.token_stride + head * a.head_stride;
      if (a.is_interleaved)
        rotate_neighbours(x, cos, sin, a.num_pairs);
      else
        rotate_halves(x, cos, sin, a.num_pairs);
    }
  }
}

static void write_cache(const CacheWriteArgs& a) {
  const int64_t row = a.head_size * a.element_size;
  const bool is_dense = a.head_stride == a.head_size && a.cache_head_stride == a.head_size;
#pragma omp parallel for schedule(static) if (a.num_tokens * a.num_heads * a.head_size > PARALLEL_ELEMENTS)
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const int64_t slot = a.slots[token];
    const int64_t start = slot / a.block_size * a.block_stride + slot % a.block_size * a.slot_stride;
    char* to = static_cast<char*>(a.cache) + start * a.element_size;
    const char* from = static_cast<const char*>(a.source) + token * a.token_stride * a.element_size;
    if (is_dense) {
      __builtin_memcpy(to, from, size_t(row * a.num_heads));
      continue;
    }
    for (int64_t head = 0; head < a.num_heads; ++head)
      __builtin_memcpy(to + head * a.cache_head_stride * a.element_size,
                       from + head * a.head_stride * a.element_size, size_t(row));
  }
}
