// What stands between the parts of a layer. Only for layers.cpp to include.

template <class T>
static void add_of(const AddArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  T* sum = static_cast<T*>(a.sum);
#pragma omp parallel for schedule(static) if (a.n > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < a.n; i += W)
    store_up_to(sum + i, load_up_to(sum + i, a.n - i) + load_up_to(x + i, a.n - i), a.n - i);
}

static void add(const AddArgs& a) {
  if (a.dtype == DType::f32) return add_of<float>(a);
  if (a.dtype == DType::bf16) return add_of<bf16>(a);
  add_of<f16>(a);
}

template <class T>
static void add_wide_of(const WidenArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
#pragma omp parallel for schedule(static) if (a.n > PARALLEL_ELEMENTS)
  for (int64_t i = 0; i < a.n; i += W) {
    const vf sum = load_up_to(a.sum + i, a.n - i) + load_up_to(x + i, a.n - i);
    store_up_to(a.sum + i, sum, a.n - i);
    store_up_to(out + i, sum, a.n - i);
  }
}

static void add_wide(const WidenArgs& a) {
  if (a.dtype == DType::f32) return add_wide_of<float>(a);
  if (a.dtype == DType::bf16) return add_wide_of<bf16>(a);
  add_wide_of<f16>(a);
}

template <class T>
static void scale_of_rows(const ScaleArgs& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.n > PARALLEL_ELEMENTS)
  for (int64_t row = 0; row < a.rows; ++row) {
    T* x = static_cast<T*>(a.x) + row * a.x_stride;
    const vf factor = splat(a.factor[row * a.factor_stride]);
    for (int64_t i = 0; i < a.n; i += W) store_up_to(x + i, load_up_to(x + i, a.n - i) * factor, a.n - i);
  }
}

static void scale(const ScaleArgs& a) {
  if (a.dtype == DType::f32) return scale_of_rows<float>(a);
  if (a.dtype == DType::bf16) return scale_of_rows<bf16>(a);
  scale_of_rows<f16>(a);
}

template <class T>
static inline vf rounded_to(vf x) {
  T rounded[W];
  store(rounded, x);
  return load(rounded);
}

template <class T>
static void weigh_of(const WeighArgs& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.n > PARALLEL_ELEMENTS / 4)
  for (int64_t row = 0; row < a.rows; ++row) {
    T* x = static_cast<T*>(a.x) + row * a.n;
    const T* gate = static_cast<const T*>(a.gate) + row * a.gate_stride;
    const vf of_row = rounded_to<T>(sigmoid_of(splat(load_part(gate, 1)[0])));
    for (int64_t i = 0; i < a.n; i += W) {
      const vf weight = a.is_of_row ? of_row : rounded_to<T>(sigmoid_of(load_up_to(gate + i, a.n - i)));
      store_up_to(x + i, load_up_to(x + i, a.n - i) * weight, a.n - i);
    }
  }
}

static void weigh(const WeighArgs& a) {
  if (a.dtype == DType::f32) return weigh_of<float>(a);
  if (a.dtype == DType::bf16) return weigh_of<bf16>(a);
  weigh_of<f16>(a);
}
