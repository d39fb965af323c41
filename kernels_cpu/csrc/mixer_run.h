// What stands between the products, the convolution and the scan of a mixer. Only for layers.cpp to include.

// log(1 + u) for u in [0, 1], small ones as exactly. Source: Cephes, logf (S. Moshier), with the correction of
// Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 1.14.1, for the rounding of 1 + u.
static inline vf log1p_of(vf u) {
  const vf sum = u + splat(1.0f);
  const vi is_large = sum > splat(1.41421356237309504880f);
  const vf x = (is_large ? sum * splat(0.5f) : sum) - splat(1.0f);
  vf y = splat(7.0376836292e-2f);
  y = y * x - splat(1.1514610310e-1f);
  y = y * x + splat(1.1676998740e-1f);
  y = y * x - splat(1.2420140846e-1f);
  y = y * x + splat(1.4249322787e-1f);
  y = y * x - splat(1.6668057665e-1f);
  y = y * x + splat(2.0000714765e-1f);
  y = y * x - splat(2.4999993993e-1f);
  y = y * x + splat(3.3333331174e-1f);
  const vf square = x * x;
  const vf exponent = is_large ? splat(1.0f) : vf{};
  vf log = y * x * square + exponent * splat(-2.12194440e-4f) - splat(0.5f) * square;
  log = x + log + exponent * splat(0.693359375f);
  const vf taken = sum - splat(1.0f);
  const vi is_lost = taken == vf{};
  return is_lost ? u : log * (u / (is_lost ? splat(1.0f) : taken));
}

// As torch has it, to the last few bits: x where exp(x) would drown the 1.
static inline vf softplus_of(vf x) {
  const vf magnitude = (vf)((vi)x & 0x7fffffff);
  const vf soft = (x > vf{} ? x : vf{}) + log1p_of(exp_of(-magnitude));
  return x == x ? soft : x;
}

template <class T>
static void soften_of(const SoftenArgs& a) {
  by_parts(a.team, a.rows * a.n > PARALLEL_ELEMENTS / 4, a.rows, [&](int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    float* out = a.out + row * a.n;
    for (int64_t i = 0; i < a.n; i += W)
      store_up_to(out + i, softplus_of(load_up_to(x + i, a.n - i) + load_up_to(a.bias + i, a.n - i)), a.n - i);
  });
}

static void soften(const SoftenArgs& a) {
  if (a.dtype == DType::f32) return soften_of<float>(a);
  if (a.dtype == DType::bf16) return soften_of<bf16>(a);
  soften_of<f16>(a);
}

template <class T>
static void open_of(const OpenArgs& a) {
  const int64_t width = a.n / a.groups;
  by_parts(a.team, a.rows * a.n > PARALLEL_ELEMENTS / 4, a.rows * a.groups, [&](int64_t part) {
    const int64_t row = part / a.groups, first = part % a.groups * width;
    T* y = static_cast<T*>(a.y) + row * a.n + first;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    const T* weight = a.weight ? static_cast<const T*>(a.weight) + first : nullptr;
    const auto opened = [&](int64_t i) {
      return load_up_to(y + i, width - i) * activate<Gate::silu>(load_up_to(gate + i, width - i));
    };
    if (!weight) {
      for (int64_t i = 0; i < width; i += W) store_up_to(y + i, opened(i), width - i);
      return;
    }
    vf sum{};
    for (int64_t i = 0; i < width; i += W) {
      const vf value = a.is_norm_first ? load_up_to(y + i, width - i) : opened(i);
      sum += value * value;
    }
    const vf factor = splat(1.0f / __builtin_sqrtf(sum_of(sum) / float(width) + a.eps));
    for (int64_t i = 0; i < width; i += W)
      store_up_to(y + i, opened(i) * factor * load_up_to(weight + i, width - i), width - i);
  });
}

static void open_gate(const OpenArgs& a) {
  if (a.dtype == DType::f32) return open_of<float>(a);
  if (a.dtype == DType::bf16) return open_of<bf16>(a);
  open_of<f16>(a);
}

// A head of `size` numbers, of the length `scale`.
template <class T>
static void lengthen(const T* x, float* out, int64_t size, float scale, float eps) {
  vf sum{};
  for (int64_t i = 0; i < size; i += W) {
    const vf value = load_up_to(x + i, size - i);
    sum = fma_of(value, value, sum);
  }
  const vf factor = splat(scale / __builtin_sqrtf(sum_of(sum) + eps));
  for (int64_t i = 0; i < size; i += W) store_up_to(out + i, load_up_to(x + i, size - i) * factor, size - i);
}

template <class T>
static void associate_of(const AssociateArgs& a) {
  const int64_t keys = a.groups * a.size, values = a.heads * a.v_size;
  const float scale = 1.0f / __builtin_sqrtf(float(a.size));
  by_parts(a.team, a.rows * (keys + values) > PARALLEL_ELEMENTS / 4, a.rows, [&](int64_t row) {
    const T* mixed = static_cast<const T*>(a.mixed) + row * (2 * keys + values);
    for (int64_t g = 0; g < a.groups; ++g) {
      lengthen(mixed + g * a.size, a.q + row * keys + g * a.size, a.size, scale, a.eps);
      lengthen(mixed + keys + g * a.size, a.k + row * keys + g * a.size, a.size, 1.0f, a.eps);
    }
    for (int64_t i = 0; i < values; i += W)
      store_up_to(a.v + row * values + i, load_up_to(mixed + 2 * keys + i, values - i), values - i);
    const T* betas = static_cast<const T*>(a.betas) + row * a.stride;
    const T* steps = static_cast<const T*>(a.steps) + row * a.stride;
    for (int64_t i = 0; i < a.heads; i += W) {
      const int64_t left = a.heads - i;
      const vf soft = softplus_of(load_up_to(steps + i, left) + load_up_to(a.bias + i, left));
      store_up_to(a.decay + row * a.heads + i, soft * load_up_to(a.a + i, left), left);
      store_up_to(a.beta + row * a.heads + i, sigmoid_of(load_up_to(betas + i, left)), left);
    }
  });
}

static void associate(const AssociateArgs& a) {
  if (a.dtype == DType::f32) return associate_of<float>(a);
  if (a.dtype == DType::bf16) return associate_of<bf16>(a);
  associate_of<f16>(a);
}

template <class T>
static void open_heads_of(const OpenHeadsArgs& a) {
  by_parts(a.team, a.rows * a.heads * a.v_size > PARALLEL_ELEMENTS / 4, a.rows * a.heads, [&](int64_t part) {
    const int64_t row = part / a.heads, first = part % a.heads * a.v_size, n = a.v_size;
    const float* y = a.y + row * a.heads * n + first;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride + first;
    T* out = static_cast<T*>(a.out) + row * a.heads * n + first;
    vf sum{};
    for (int64_t i = 0; i < n; i += W) {
      const vf value = load_up_to(y + i, n - i);
      sum = fma_of(value, value, sum);
    }
    const vf factor = splat(1.0f / __builtin_sqrtf(sum_of(sum) / float(n) + a.eps));
    for (int64_t i = 0; i < n; i += W) {
      const vf normed = load_up_to(y + i, n - i) * factor * load_up_to(a.weight + i, n - i);
      store_up_to(out + i, normed * activate<Gate::silu>(load_up_to(gate + i, n - i)), n - i);
    }
  });
}

static void open_heads(const OpenHeadsArgs& a) {
  if (a.dtype == DType::f32) return open_heads_of<float>(a);
  if (a.dtype == DType::bf16) return open_heads_of<bf16>(a);
  open_heads_of<f16>(a);
}
