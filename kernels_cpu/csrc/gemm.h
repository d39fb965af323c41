// Products with packed weights: x prepared once, then panels times blocks of rows. Only for linear.cpp to include.

// What the tiles read instead of x.
struct Prepared {
  const void* rows;    // float32, pairs of bfloat16 or words of rounded activations: [rows, stride]
  int64_t stride;      // in elements of 4 bytes
  const float* scales;   // [rows, groups_of_x]: of rounded activations
  const int32_t* totals;  // [rows, groups]: sums of rounded activations
  int64_t groups_of_x;   // 1, or as many as the weights have
};

static inline vf load_scales(const LinearWeights& w, int64_t index) {
  if (w.scale_dtype == DType::bf16) return load(static_cast<const bf16*>(w.scales) + index);
  if (w.scale_dtype == DType::f16) return load(static_cast<const f16*>(w.scales) + index);
  return load(static_cast<const float*>(w.scales) + index);
}

static inline vi load_zeros(const LinearWeights& w, int64_t index) {
  if (!w.zeros) return splat_int(w.zero);
  return load_bytes(w.zeros + index);
}

template <class T, int ROWS, int VECS>
static inline void write_tile(const LinearArgs& a, int64_t row, int64_t output, vf (&sums)[ROWS][VECS]) {
  const int64_t left = a.weights->num_outputs - output;
  for (int m = 0; m < ROWS; ++m) {
    T* out = static_cast<T*>(a.out) + (row + m) * a.out_stride + output;
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) {
      const vf bias = a.weights->bias ? load(a.weights->bias + output + v * W) : vf{};
      const int64_t n = left - v * W;
      if (n >= W) store(out + v * W, sums[m][v] + bias);
      else if (n > 0) store_part(out + v * W, sums[m][v] + bias, int(n));
    }
  }
}

// Float32 rows, weights widened in registers.
template <Format F>
struct Widened {
  template <class T, int ROWS, int VECS>
  static void tile(const LinearArgs& a, const Prepared& p, int64_t row, int64_t panel, int first) {
    const LinearWeights& w = *a.weights;
    const float* x[ROWS];
    for (int m = 0; m < ROWS; ++m) x[m] = static_cast<const float*>(p.rows) + (row + m) * p.stride;
    vf sums[ROWS][VECS] = {};
    vf scale[VECS] = {}, zero[VECS] = {};
    const int64_t slots_of_group = w.num_slots / w.num_groups;
    const uint32_t* lanes = w.lanes + panel * w.num_slots * PANEL + first * W;
    for (int64_t g = 0; g < w.num_groups; ++g, lanes += slots_of_group * PANEL) {
      if constexpr (F == Format::u8 || F == Format::u4)
        for (int v = 0; v < VECS; ++v) {
          const int64_t index = (panel * w.num_groups + g) * PANEL + (first + v) * W;
          scale[v] = load_scales(w, index);
          zero[v] = __builtin_convertvector(load_zeros(w, index), vf);
        }
      tile_floats<F, ROWS, VECS>(lanes, slots_of_group, x, sums, scale, zero);
      for (int m = 0; m < ROWS; ++m) x[m] += slots_of_group * inputs_of(F);
    }
    write_tile<T, ROWS, VECS>(a, row, panel * PANEL + first * W, sums);
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  template <class T, int ROWS, int VECS>
  static void tile(const LinearArgs& a, const Prepared& p, int64_t row, int64_t panel, int first) {
    const LinearWeights& w = *a.weights;
    const uint32_t* x[ROWS];
    for (int m = 0; m < ROWS; ++m) x[m] = static_cast<const uint32_t*>(p.rows) + (row + m) * p.stride;
    vf sums[ROWS][VECS] = {};
    tile_pairs<ROWS, VECS>(w.lanes + panel * w.num_slots * PANEL + first * W, w.num_slots, x, sums);
    write_tile<T, ROWS, VECS>(a, row, panel * PANEL + first * W, sums);
  }
};
#endif

// Rounded rows: exact sums of integers in each group, scaled in float32.
template <Format F>
struct Codes {
  template <class T, int ROWS, int VECS>
  static void tile(const LinearArgs& a, const Prepared& p, int64_t row, int64_t panel, int first) {
    const LinearWeights& w = *a.weights;
    constexpr int WORDS = Dots::WORDS * (F == Format::u4 ? 2 : 1);
    const uint32_t* x[ROWS];
    for (int m = 0; m < ROWS; ++m) x[m] = static_cast<const uint32_t*>(p.rows) + (row + m) * p.stride;
    vf sums[ROWS][VECS] = {};
    const int64_t slots_of_group = w.num_slots / w.num_groups;
    const uint32_t* lanes = w.lanes + panel * w.num_slots * PANEL + first * W;
    for (int64_t g = 0; g < w.num_groups; ++g, lanes += slots_of_group * PANEL) {
      vi dots[ROWS][VECS] = {};
      tile_codes<F, ROWS, VECS>(lanes, slots_of_group, x, dots);
      for (int m = 0; m < ROWS; ++m) x[m] += slots_of_group * WORDS;
      const int64_t g_of_x = p.groups_of_x == 1 ? 0 : g;
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) {
        const int64_t index = (panel * w.num_groups + g) * PANEL + (first + v) * W;
        const vf scale = load_scales(w, index);
        const vi zero = load_zeros(w, index) - Dots::SHIFT;
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
          const vi dot = dots[m][v] - zero * splat_int(p.totals[(row + m) * w.num_groups + g]);
          const vf scale_of_x = splat(p.scales[(row + m) * p.groups_of_x + g_of_x]);
          sums[m][v] += __builtin_convertvector(dot, vf) * (scale * scale_of_x);
        }
      }
    }
    write_tile<T, ROWS, VECS>(a, row, panel * PANEL + first * W, sums);
  }
};

// --- tiles by the number of rows -------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECS = 4;  // 24 of 32 registers hold sums
#elif defined(__aarch64__)
constexpr int TILE_ROWS = 4, TILE_VECS = 4;
#else
constexpr int TILE_ROWS = 4, TILE_VECS = 2;  // 8 of 16 registers
#endif
constexpr int LONE_VECS = VECS_OF_PANEL < 8 ? VECS_OF_PANEL : 8;  // enough sums to hide the latency of one row

template <class Kind, class T, int ROWS>
static void panel_of_rows(const LinearArgs& a, const Prepared& p, int64_t row, int64_t panel) {
  constexpr int VECS = ROWS == 1 ? LONE_VECS : TILE_VECS;
  for (int first = 0; first < VECS_OF_PANEL; first += VECS) {
    if (panel * PANEL + first * W >= a.weights->num_outputs) return;
    Kind::template tile<T, ROWS, VECS>(a, p, row, panel, first);
  }
}

template <class Kind, class T>
static void panel_of_chunk(const LinearArgs& a, const Prepared& p, int64_t row, int64_t end, int64_t panel) {
  for (; row + TILE_ROWS <= end; row += TILE_ROWS) panel_of_rows<Kind, T, TILE_ROWS>(a, p, row, panel);
  switch (end - row) {
    case 1: return panel_of_rows<Kind, T, 1>(a, p, row, panel);
    case 2: return panel_of_rows<Kind, T, 2>(a, p, row, panel);
    case 3: return panel_of_rows<Kind, T, 3>(a, p, row, panel);
#if defined(__AVX512F__)
    case 4: return panel_of_rows<Kind, T, 4>(a, p, row, panel);
    case 5: return panel_of_rows<Kind, T, 5>(a, p, row, panel);
#endif
    default: return;
  }
}

// --- preparing x -----------------------------------------------------------------------------------------------------

template <class V, int... J>
static inline V swap_middles(V x, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(x, x, ((J & ~3) | (J & 1) << 1 | (J >> 1 & 1))...);
}

// One row in float32, zeros after its end.
template <class T>
static void widen_row(const T* x, int64_t n, int64_t padded, float* out) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load(x + i));
  if (i < n) {
    const vf rest = load_part(x + i, int(n - i));
    for (int64_t j = i; j < n; ++j) out[j] = rest[j - i];
  }
  for (i = n; i < padded; ++i) out[i] = 0;
}

// Writes W rounded activations as the words that `Dots::add` broadcasts.
static inline void store_rounded(vi q, uint32_t* words) {
  typedef int16_t vs __attribute__((vector_size(W * 2)));
  typedef int16_t vs_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));
  if constexpr (Dots::WORDS == 1) {
    store_bytes(reinterpret_cast<int8_t*>(words), q);
  } else {
    const vs wide = __builtin_convertvector(q, vs);
    *reinterpret_cast<vs_mem*>(words) = swap_middles(wide, std::make_integer_sequence<int, W>{});
  }
}

// A scale and the sum of what was rounded, for `n` inputs, a multiple of 16: q = round(x / scale), halves to even, with
// the division in float32. A scale of 0 stands for inputs that are all 0.
static int32_t round_inputs(const float* x, int64_t n, float scale, uint32_t* words) {
  const vf divisor = splat(scale > 0 ? scale : 1.0f);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vi total = vi{};
  for (int64_t i = 0; i < n; i += W) {
    const vi q = __builtin_convertvector((load(x + i) / divisor + magic) - magic, vi);
    total += q;
    store_rounded(q, words + i / 4 * Dots::WORDS);
  }
  return sum_of(total);
}

// max |x| / 127, the scale that uses the whole range. Source: Dettmers et al. 2022, section 2 ("absmax").
static float scale_of(const float* x, int64_t n) {
  vf most = vf{};
  for (int64_t i = 0; i < n; i += W) most = max((vf)((vi)load(x + i) & 0x7fffffff), most);
  return max_of(most) / 127.0f;
}

static void round_row(const LinearWeights& w, const float* x, uint32_t* words, float* scales, int32_t* totals) {
  const bool by_token = w.rounding == Rounding::by_token;
  if (by_token) scales[0] = scale_of(x, w.group_size * w.num_groups);
  for (int64_t g = 0; g < w.num_groups; ++g) {
    const float* group = x + g * w.group_size;
    if (!by_token) scales[g] = scale_of(group, w.group_size);
    totals[g] = round_inputs(group, w.group_size, scales[by_token ? 0 : g], words + g * (w.group_size / 4 * Dots::WORDS));
  }
}
