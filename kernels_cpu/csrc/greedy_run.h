// The most likely token of each row, from logits as the head made them: nothing is widened into memory first. Only for
// layers.cpp to include.

constexpr int64_t GREEDY_BLOCK = 1024;  // ids, looked through again for the one

template <class T>
static inline vf load_candidates(const T* p, int64_t left) {
  if (left >= W) return load(p);
  vf x = load_part(p, int(left));
  for (int i = int(left); i < W; ++i) x[i] = -__builtin_inff();
  return x;
}

// The lowest id of the largest logit; -1 if that is not finite or there is a NaN.
template <class T>
static int64_t find_greedy(const T* logits, int64_t size) {
  float largest = -__builtin_inff();
  int64_t where = 0;
  vi is_nan{};
  for (int64_t begin = 0; begin < size; begin += GREEDY_BLOCK) {
    const int64_t end = begin + GREEDY_BLOCK < size ? begin + GREEDY_BLOCK : size;
    vf most = splat(-__builtin_inff());
    for (int64_t i = begin; i < end; i += W) {
      const vf x = load_candidates(logits + i, end - i);
      is_nan |= x != x;
      most = max(most, x);
    }
    const float best = max_of(most);
    if (best > largest) largest = best, where = begin;
  }
  for (int i = 0; i < W; ++i)
    if (is_nan[i]) return -1;
  if (largest - largest != 0.0f) return -1;
  for (int64_t i = where;; i += W) {
    const vf x = load_candidates(logits + i, size - i);
    for (int j = 0; j < W; ++j)
      if (x[j] == largest) return i + j;
  }
}

template <class T>
static void choose_greedily(const GreedyArgs& a) {
  const int threads = threads_of(a.num_rows, a.num_rows * a.vocab_size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < a.num_rows; ++row) {
    const int64_t id = find_greedy(static_cast<const T*>(a.logits) + row * a.stride, a.vocab_size);
    a.out[row] = id < 0 ? 0 : id;
    a.is_broken[row] = id < 0;
  }
}

static void most_likely(const GreedyArgs& a) {
  if (a.dtype == DType::f32) choose_greedily<float>(a);
  if (a.dtype == DType::bf16) choose_greedily<bf16>(a);
  if (a.dtype == DType::f16) choose_greedily<f16>(a);
}
