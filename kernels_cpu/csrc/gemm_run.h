// One product from beginning to end: x prepared, the panels shared among threads. Only for linear.cpp to include.

constexpr int64_t CHUNK = TILE_ROWS * 32;  // rows that meet a panel before the next one: both stay in the second cache

static inline int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }

static int threads_of_product(const LinearArgs& a, int64_t num_units) {
#if defined(_OPENMP)
  const int64_t work = a.rows * a.weights->num_outputs * a.weights->num_inputs;
  const int64_t useful = work / (1 << 17) + 1;  // a thread should have some microseconds to do
  int64_t threads = omp_get_max_threads();
  if (threads > num_units) threads = num_units;
  if (threads > useful) threads = useful;
  if (a.team) return threads > 1 ? a.team->threads : 1;
  return int(threads < 1 ? 1 : threads);
#else
  (void)a, (void)num_units;
  return 1;
#endif
}

// What a call needs beside its arguments. One block of memory, 64 bytes aligned.
struct Memory {
  uint32_t* rows;   // [rows, words]: what the tiles read
  float* scales;    // [rows, groups of x]
  int32_t* totals;  // [rows, groups]
  float* wide;      // [threads, padded]: one row in float32
  void* block;
};

static inline size_t aligned(int64_t count) { return (size_t(count) * 4 + 63) & ~size_t(63); }

static bool take_memory(Memory& m, int64_t rows, int64_t words, int64_t groups, int64_t padded, int threads) {
  const size_t of_rows = aligned(rows * words), of_groups = aligned(rows * groups), of_wide = aligned(threads * padded);
  m.block = __builtin_malloc(of_rows + 2 * of_groups + of_wide + 64);
  if (!m.block) return false;
  char* p = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(m.block) + 63) & ~uintptr_t(63));
  m.rows = reinterpret_cast<uint32_t*>(p);
  m.scales = reinterpret_cast<float*>(p + of_rows);
  m.totals = reinterpret_cast<int32_t*>(p + of_rows + of_groups);
  m.wide = reinterpret_cast<float*>(p + of_rows + 2 * of_groups);
  return true;
}

// The units of one thread. They lie side by side in memory, and with few rows are the same in every call: the thread
// reads them front to back, from memory that it was the first to touch (linear_pack.h). Who is done helps the others.
struct alignas(64) Share {
  int64_t next, end;
};

static inline void share_units(Share* shares, int threads, int64_t units) {
  for (int t = 0; t < threads; ++t) shares[t] = {share_of(units, threads, t), share_of(units, threads, t + 1)};
}

// The next unit of thread `own`, or one of another thread's; -1: none is left.
static inline int64_t take_unit(Share* shares, int threads, int own) {
  for (int i = 0; i < threads; ++i) {
    Share& share = shares[own + i < threads ? own + i : own + i - threads];
    if (__atomic_load_n(&share.next, __ATOMIC_RELAXED) >= share.end) continue;
    const int64_t unit = __atomic_fetch_add(&share.next, 1, __ATOMIC_RELAXED);
    if (unit < share.end) return unit;
  }
  return -1;
}

constexpr int64_t FEW_ROWS = 8;  // one thread prepares so many in less time than threads take to meet

// `prepare(row, wide)` for every row, then every panel with every chunk of rows. With few rows threads meet once.
template <class Kind, class T, class Prepare>
static void run(const LinearArgs& a, const Prepared& p, int threads, float* wide, int64_t padded, Prepare prepare) {
  const int64_t panels = (a.weights->num_outputs + PANEL - 1) / PANEL;
  const int64_t units = panels * chunks_of(a.rows);
  const bool is_shared = a.rows > FEW_ROWS;
  Share* shares = reinterpret_cast<Share*>(__builtin_alloca_with_align(size_t(threads) * sizeof(Share), 512));
  share_units(shares, threads, units);
  if (!is_shared)
    for (int64_t row = 0; row < a.rows; ++row) prepare(row, wide);
  auto multiply_units = [&](int own) {
    for (int64_t unit; (unit = take_unit(shares, threads, own)) >= 0;) {
      const int64_t row = unit / panels * CHUNK;
      const int64_t end = row + CHUNK < a.rows ? row + CHUNK : a.rows;
      Chunks<Kind, T>::run(a, p, row, end, unit % panels);
    }
  };
  if (!is_shared) return spread(a.team, threads, multiply_units);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* own_wide = wide + current_thread() * padded;
    (void)own_wide;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < a.rows; ++row) prepare(row, own_wide);
    multiply_units(current_thread());
  }
}

template <class T>
static inline const T* row_of(const LinearArgs& a, int64_t row) {
  return static_cast<const T*>(a.x) + row * a.x_stride;
}

// Weights in floating point, or codes whose activations stay as they are.
template <Format F, class T>
static bool multiply_widened(const LinearArgs& a, int threads) {
  const LinearWeights& w = *a.weights;
  const int64_t padded = w.num_slots * inputs_of(F);
  if constexpr (sizeof(T) == 4)
    if (padded == w.num_inputs) {
      run<Widened<F>, T>(a, {a.x, a.x_stride, nullptr, nullptr, 1}, threads, nullptr, 0, [](int64_t, float*) {});
      return true;
    }
  Memory m;
  if (!take_memory(m, a.rows, padded, 0, 0, threads)) return false;
  float* rows = reinterpret_cast<float*>(m.rows);
  run<Widened<F>, T>(a, {rows, padded, nullptr, nullptr, 1}, threads, nullptr, 0, [&](int64_t row, float*) {
    widen_row(row_of<T>(a, row), w.num_inputs, padded, rows + row * padded);
  });
  __builtin_free(m.block);
  return true;
}

template <Format F, class T>
static bool multiply_codes(const LinearArgs& a, int threads) {
  const LinearWeights& w = *a.weights;
  const int64_t padded = w.num_slots * inputs_of(F), words = padded / 4 * Dots::WORDS;
  const int64_t groups_of_x = w.rounding == Rounding::by_token ? 1 : w.num_groups;
  Memory m;
  if (!take_memory(m, a.rows, words, w.num_groups, padded, threads)) return false;
  run<Codes<F>, T>(a, {m.rows, words, m.scales, m.totals, groups_of_x}, threads, m.wide, padded,
                   [&](int64_t row, float* wide) {
                     widen_row(row_of<T>(a, row), w.num_inputs, padded, wide);
                     round_row(w, wide, m.rows + row * words, m.scales + row * groups_of_x,
                               m.totals + row * w.num_groups);
                   });
  __builtin_free(m.block);
  return true;
}

#if defined(__AVX512BF16__)
static bool multiply_pairs(const LinearArgs& a, int threads) {
  const LinearWeights& w = *a.weights;
  const bool is_whole = w.num_inputs % 2 == 0 && a.x_stride % 2 == 0 && reinterpret_cast<uintptr_t>(a.x) % 4 == 0;
  if (is_whole) {
    run<Pairs, bf16>(a, {a.x, a.x_stride / 2, nullptr, nullptr, 1}, threads, nullptr, 0, [](int64_t, float*) {});
    return true;
  }
  Memory m;
  if (!take_memory(m, a.rows, w.num_slots, 0, 0, threads)) return false;
  run<Pairs, bf16>(a, {m.rows, w.num_slots, nullptr, nullptr, 1}, threads, nullptr, 0, [&](int64_t row, float*) {
    uint32_t* out = m.rows + row * w.num_slots;
    out[w.num_slots - 1] = 0;
    __builtin_memcpy(out, row_of<bf16>(a, row), size_t(w.num_inputs) * 2);
  });
  __builtin_free(m.block);
  return true;
}
#endif

template <class T>
static bool multiply_of(const LinearArgs& a) {
  const LinearWeights& w = *a.weights;
  const int64_t panels = (w.num_outputs + PANEL - 1) / PANEL;
  const int threads = threads_of_product(a, panels * chunks_of(a.rows));
  const bool is_rounded = w.rounding != Rounding::none;
  switch (w.format) {
    case Format::f32: return multiply_widened<Format::f32, T>(a, threads);
    case Format::f16: return multiply_widened<Format::f16, T>(a, threads);
    case Format::bf16:
#if defined(__AVX512BF16__)
      if (a.dtype == DType::bf16) return multiply_pairs(a, threads);
#endif
      return multiply_widened<Format::bf16, T>(a, threads);
    case Format::u8: return is_rounded ? multiply_codes<Format::u8, T>(a, threads) : multiply_widened<Format::u8, T>(a, threads);
    case Format::u4: return is_rounded ? multiply_codes<Format::u4, T>(a, threads) : multiply_widened<Format::u4, T>(a, threads);
  }
  return true;
}

static bool multiply(const LinearArgs& a) {
  if (a.rows == 0) return true;
  if (a.dtype == DType::f32) return multiply_of<float>(a);
  if (a.dtype == DType::bf16) return multiply_of<bf16>(a);
  return multiply_of<f16>(a);
}
