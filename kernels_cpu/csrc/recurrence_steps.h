// One step of a scan, as every decoded token takes it: the state goes through once, as it lies in memory, so that a step
// costs what reading and writing it costs. To the bits of the passes over many steps: each number of the state is made by
// the same products, and sums over the state go W numbers at a time, halved until one is left. Only for layers.cpp to
// include.

template <int COUNT>
static inline vf paired(vf (&sums)[COUNT]) {
  if constexpr (COUNT == 1) {
    return sums[0];
  } else {
    vf fewer[COUNT / 2];
#pragma GCC unroll 8
    for (int n = 0; n < COUNT / 2; ++n) fewer[n] = sums[n] + sums[n + COUNT / 2];
    return paired(fewer);
  }
}

// Of W numbers n of the states of W channels, a vector for each n: sum over n of next[n] * ask[n].
static inline vf asked_of_lanes(const vf (&next)[W], const float* ask) {
  constexpr int HALF = W / 2;
  vf sums[HALF];
#pragma GCC unroll 8
  for (int n = 0; n < HALF; ++n) sums[n] = fma_of(next[n + HALF], splat(ask[n + HALF]), next[n] * splat(ask[n]));
  return paired(sums);
}

template <int STEP, int COUNT>
static inline vf halved(vf (&sums)[COUNT]) {
  using lanes = std::make_integer_sequence<int, W>;
  if constexpr (STEP == 0) {
    return sums[0];
  } else {
    vf fewer[STEP];
#pragma GCC unroll 8
    for (int i = 0; i < STEP; ++i)
      fewer[i] = even_blocks<STEP>(sums[i], sums[i + STEP], lanes{}) + odd_blocks<STEP>(sums[i], sums[i + STEP], lanes{});
    return halved<STEP / 2>(fewer);
  }
}

// The same sums where next[i] holds the W numbers of channel i: lane i is channel i's.
static inline vf asked_of_rows(const vf (&next)[W], vf ask) {
  using lanes = std::make_integer_sequence<int, W>;
  constexpr int HALF = W / 2;
  const vf first = even_blocks<HALF>(ask, ask, lanes{}), second = odd_blocks<HALF>(ask, ask, lanes{});
  vf sums[HALF];
#pragma GCC unroll 8
  for (int i = 0; i < HALF; ++i)
    sums[i] = fma_of(odd_blocks<HALF>(next[i], next[i + HALF], lanes{}), second,
                     even_blocks<HALF>(next[i], next[i + HALF], lanes{}) * first);
  return halved<W / 4>(sums);
}

static inline bool is_step(const Rows& rows, int64_t sequence) {
  return rows.ends[sequence] - rows.starts[sequence] == 1;
}

// Units of work that a thread takes at a time: few where sequences differ in length, runs of memory where all are steps.
static inline int64_t grain_of(const Rows& rows, int64_t units, int threads) {
  for (int64_t s = 0; s < rows.num_sequences; ++s)
    if (!is_step(rows, s)) return 1;
  const int64_t grain = units / (threads * 4);
  return grain > 1 ? grain : 1;
}

constexpr int64_t FLOATS_AFTER = 1024;  // a state goes through once, front to back: what comes so much later is asked for

// W channels of one sequence; the state has whole vectors.
template <class T>
static void selective_step(const SelectiveArgs& a, int64_t sequence, int64_t first, const float* b, const float* c,
                           int64_t first_row, int64_t padded) {
  const int64_t t = a.rows.starts[sequence], row = (t - first_row) * padded;
  const float* old = state_before(a.rows, static_cast<const float*>(a.states), sequence);
  float* now = state_after(a.rows, a.states, sequence) + first * a.size;
  if (old) old += first * a.size;
  const float *rates = a.a + first * a.size, *dt = a.dt + t * a.dt_stride + first;
  const vf x = load(static_cast<const T*>(a.x) + t * a.x_stride + first);
  const vf added = load(dt) * x;
  vf sum{};
  for (int64_t n = 0; n < a.size; n += W) {
    const vf add = load(b + row + n);
    vf next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const int64_t at = i * a.size + n;
      if (old) __builtin_prefetch(old + at + FLOATS_AFTER, 1);
      __builtin_prefetch(rates + at + FLOATS_AFTER);
      next[i] = fma_of(exp_of(splat(dt[i]) * load(rates + at)), old ? load(old + at) : vf{}, splat(added[i]) * add);
      store(now + at, next[i]);
    }
    sum = sum + asked_of_rows(next, load(c + row + n));
  }
  const vf d = a.d ? load(a.d + first) : vf{};
  store(static_cast<T*>(a.out) + t * a.channels + first, fma_of(d, x, sum));
}

// W channels of one head of one sequence; the state has whole vectors.
template <class T>
static void ssd_step(const SsdArgs& a, int64_t sequence, int64_t head, int64_t first, const float* b, const float* c,
                     int64_t first_row, int64_t padded) {
  const int64_t t = a.rows.starts[sequence], offset = head * a.channels + first;
  const int64_t row = ((t - first_row) * a.groups + head / (a.heads / a.groups)) * padded;
  const float* old = state_before(a.rows, static_cast<const float*>(a.states), sequence);
  float* now = state_after(a.rows, a.states, sequence) + offset * a.size;
  if (old) old += offset * a.size;
  const float dt = a.dt[t * a.dt_stride + head];
  const vf keep = splat(exp_of(splat(dt * a.a[head]))[0]);
  const vf x = load(static_cast<const T*>(a.x) + t * a.x_stride + offset);
  const vf added = x * splat(dt);
  // Channel after channel, so that memory is one stream; what is asked of them comes from the first cache.
  for (int i = 0; i < W; ++i) {
    const vf adds = splat(added[i]);
    for (int64_t at = i * a.size, n = 0; n < a.size; n += W, at += W) {
      if (old) __builtin_prefetch(old + at + FLOATS_AFTER, 1);
      store(now + at, fma_of(keep, old ? load(old + at) : vf{}, adds * load(b + row + n)));
    }
  }
  vf sum{};
  for (int64_t n = 0; n < a.size; n += W) {
    vf next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) next[i] = load(now + i * a.size + n);
    sum = sum + asked_of_rows(next, load(c + row + n));
  }
  const vf d = splat(a.d ? a.d[head] : 0.0f);
  store(static_cast<T*>(a.out) + t * a.heads * a.channels + offset, fma_of(d, x, sum));
}

static inline vf change_of(vf value, vf rate, vf keep, vf recalled) { return rate * fma_of(-keep, recalled, value); }

// VECS vectors of values of one head of one sequence. The state is read twice, the second time from a cache.
template <class T, int VECS>
static void delta_step(const DeltaArgs& a, int64_t sequence, int64_t head, int64_t first, const float* q, const float* k,
                       const float* dots, int64_t first_row, int64_t padded) {
  const int64_t t = a.rows.starts[sequence], row = (t - first_row) * a.groups + head / (a.heads / a.groups);
  const int64_t offset = head * a.size * a.v_size + first;
  const float* old = state_before(a.rows, static_cast<const float*>(a.states), sequence);
  float* now = state_after(a.rows, a.states, sequence) + offset;
  const float *key = k + row * padded, *query = q + row * padded;
  const vf keep = splat(exp_of(splat(a.decay[t * a.decay_stride + head]))[0]);
  const vf rate = splat(a.beta[t * a.beta_stride + head]), dot = splat(dots[row]);
  vf recalled[2][VECS] = {}, asked[2][VECS] = {};
  if (old) {
    old += offset;
    for (int64_t i = 0; i < a.size; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        const vf value = load(old + i * a.v_size + v * W);
        recalled[i & 1][v] = fma_of(value, splat(key[i]), recalled[i & 1][v]);
        asked[i & 1][v] = fma_of(value, splat(query[i]), asked[i & 1][v]);
      }
  }
  vf change[VECS];
  const int64_t at = head * a.v_size + first;
#pragma GCC unroll 4
  for (int v = 0; v < VECS; ++v) {
    const vf value = load(static_cast<const T*>(a.v) + t * a.v_stride + at + v * W);
    change[v] = change_of(value, rate, keep, recalled[0][v] + recalled[1][v]);
    store(static_cast<T*>(a.out) + t * a.heads * a.v_size + at + v * W,
          fma_of(dot, change[v], keep * (asked[0][v] + asked[1][v])));
  }
  for (int64_t i = 0; i < a.size; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      const vf kept = old ? keep * load(old + i * a.v_size + v * W) : vf{};
      store(now + i * a.v_size + v * W, fma_of(splat(key[i]), change[v], kept));
    }
}
