// Register tiles: ROWS rows of x times VECS vectors of outputs, over a range of slots. Only for linear.cpp to include.
//
// Each output keeps one accumulator that takes its inputs in order, whatever the tile: a row's result is bitwise the
// same alone and among others, and with any number of threads.

typedef uint32_t vu_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));

constexpr int VECS_OF_PANEL = int(PANEL) / W;

constexpr int64_t AHEAD = 12 * PANEL;  // lanes: a lone row waits for memory, whose own prefetchers stop at every page

// Asks for the lanes that come AHEAD; those past the end of the weights are asked for in vain.
template <int ROWS, int VECS>
static inline void prefetch_lanes(const uint32_t* lanes) {
  if constexpr (ROWS == 1) {
#pragma GCC unroll 16
    for (int i = 0; i < VECS * W; i += 16) __builtin_prefetch(lanes + AHEAD + i);
  }
}

static inline vu load_lanes(const uint32_t* p) { return *reinterpret_cast<const vu_mem*>(p); }

// Four codes of each lane times four rounded activations, added to the lane's sum. `x` comes from `Dots::prepare`.
struct Dots {
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
  static constexpr int WORDS = 1;  // of 32 bits, for four activations
#else
  static constexpr int WORDS = 2;
#endif
#if defined(__ARM_FEATURE_DOTPROD) && !defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr int SHIFT = 128;  // the instruction takes signed codes: they are moved down by this much
#else
  static constexpr int SHIFT = 0;
#endif

  // Activations 4i to 4i + 3 as the words that `add` broadcasts.
  static inline void prepare(const int8_t* q, uint32_t* words) {
    if constexpr (WORDS == 1) {
      __builtin_memcpy(words, q, 4);
    } else {
      words[0] = uint32_t(uint16_t(q[0])) | uint32_t(uint16_t(q[2])) << 16;
      words[1] = uint32_t(uint16_t(q[1])) | uint32_t(uint16_t(q[3])) << 16;
    }
  }

  static inline vi add(vi sum, vu codes, const uint32_t* words) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(int(words[0])));
#elif defined(__AVXVNNI__)
    return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, _mm256_set1_epi32(int(words[0])));
#elif defined(__ARM_FEATURE_MATMUL_INT8)
    const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(words[0]));
    return (vi)vusdotq_s32((int32x4_t)sum, (uint8x16_t)codes, x);
#elif defined(__ARM_FEATURE_DOTPROD)
    const int8x16_t x = vreinterpretq_s8_u32(vdupq_n_u32(words[0]));
    return (vi)vdotq_s32((int32x4_t)sum, (int8x16_t)(codes ^ 0x80808080u), x);
#else
    const vu even = codes & 0x00ff00ffu, odd = (codes >> 8) & 0x00ff00ffu;
    return sum + multiply_add(even, words[0]) + multiply_add(odd, words[1]);
#endif
  }

  // Two products of 16 bits, summed, in each lane.
  static inline vi multiply_add(vu a, uint32_t word) {
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi32(int(word)));
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi32(int(word)));
#elif defined(__SSE2__)
    return (vi)_mm_madd_epi16((__m128i)a, _mm_set1_epi32(int(word)));
#else
    const vi low = (vi)(a & 0xffffu), high = (vi)(a >> 16);
    return low * splat_int(int16_t(word & 0xffffu)) + high * splat_int(int16_t(word >> 16));
#endif
  }
};

// --- weights that are widened to float32 -----------------------------------------------------------------------------

// Input `j` of each lane.
template <Format F>
static inline vf widen(vu lanes, int j) {
  if constexpr (F == Format::f32) {
    return (vf)lanes;
  } else if constexpr (F == Format::bf16) {
    return j ? (vf)(lanes & 0xffff0000u) : (vf)(lanes << 16);
  } else if constexpr (F == Format::f16) {
    const vu bits = j ? lanes >> 16 : lanes & 0xffffu;
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)bits));
#else
    const vu magnitude = (bits & 0x7fffu) << 13;
    const vu finite = (vu)((vf)magnitude * splat(0x1p112f));
    const vu is_special = (vu)(magnitude >= (0x7c00u << 13));
    return (vf)(finite | (is_special & 0x7f800000u) | ((bits & 0x8000u) << 16));
#endif
  } else if constexpr (F == Format::u8) {
    return __builtin_convertvector((vi)((lanes >> (8 * j)) & 0xffu), vf);
  } else {
    return __builtin_convertvector((vi)((lanes >> (8 * (j & 3) + (j & 4))) & 0xfu), vf);
  }
}

// sums += weights * x over `num_slots` slots; x[m] points at the first input, in float32.
template <Format F, int ROWS, int VECS>
static inline void tile_floats(const uint32_t* lanes, int64_t num_slots, const float* const* x, vf (&sums)[ROWS][VECS],
                               const vf (&scale)[VECS], const vf (&zero)[VECS]) {
  constexpr int INPUTS = int(inputs_of(F));
  constexpr bool HAS_CODES = F == Format::u8 || F == Format::u4;
  for (int64_t slot = 0; slot < num_slots; ++slot, lanes += PANEL) {
    prefetch_lanes<ROWS, VECS>(lanes);
    vu raw[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) raw[v] = load_lanes(lanes + v * W);
#pragma GCC unroll 8
    for (int j = 0; j < INPUTS; ++j) {
      vf weight[VECS];
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) {
        weight[v] = widen<F>(raw[v], j);
        if constexpr (HAS_CODES) weight[v] = (weight[v] - zero[v]) * scale[v];  // exact difference first
      }
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m) {
        const vf value = splat(x[m][slot * INPUTS + j]);
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) sums[m][v] += value * weight[v];
      }
    }
  }
}

// --- products of bfloat16 by the unit --------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
template <int ROWS, int VECS>
static inline void tile_pairs(const uint32_t* lanes, int64_t num_slots, const uint32_t* const* x,
                              vf (&sums)[ROWS][VECS]) {
  for (int64_t slot = 0; slot < num_slots; ++slot, lanes += PANEL) {
    prefetch_lanes<ROWS, VECS>(lanes);
    vu raw[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) raw[v] = load_lanes(lanes + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const __m512i pair = _mm512_set1_epi32(int(x[m][slot]));
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v)
        sums[m][v] = (vf)_mm512_dpbf16_ps((__m512)sums[m][v], (__m512bh)pair, (__m512bh)raw[v]);
    }
  }
}
#endif

// --- codes times rounded activations ---------------------------------------------------------------------------------

template <Format F, int ROWS, int VECS>
static inline void tile_codes(const uint32_t* lanes, int64_t num_slots, const uint32_t* const* x,
                              vi (&sums)[ROWS][VECS]) {
  constexpr int WORDS = Dots::WORDS * (F == Format::u4 ? 2 : 1);
  // A lone row has too few sums to hide the latency of one: exact sums may be taken in two.
  constexpr bool HAS_TWO = F == Format::u4 && ROWS == 1;
  vi seconds[HAS_TWO ? VECS : 1] = {};
  for (int64_t slot = 0; slot < num_slots; ++slot, lanes += PANEL) {
    prefetch_lanes<ROWS, VECS>(lanes);
    vu raw[VECS];
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) raw[v] = load_lanes(lanes + v * W);
    if constexpr (F == Format::u4) {
      vu high[VECS];
#pragma GCC unroll 16
      for (int v = 0; v < VECS; ++v) {
        high[v] = (raw[v] >> 4) & 0x0f0f0f0fu;
        raw[v] = raw[v] & 0x0f0f0f0fu;
      }
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) {
          sums[m][v] = Dots::add(sums[m][v], raw[v], x[m] + slot * WORDS);
          vi& sum = HAS_TWO ? seconds[v] : sums[m][v];
          sum = Dots::add(sum, high[v], x[m] + slot * WORDS + Dots::WORDS);
        }
    } else {
#pragma GCC unroll 16
      for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 16
        for (int v = 0; v < VECS; ++v) sums[m][v] = Dots::add(sums[m][v], raw[v], x[m] + slot * WORDS);
    }
  }
  if constexpr (HAS_TWO)
#pragma GCC unroll 16
    for (int v = 0; v < VECS; ++v) sums[0][v] += seconds[v];
}
