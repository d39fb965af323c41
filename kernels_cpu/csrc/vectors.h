// Vectors of one ISA level: loads and stores that convert, a transpose, exp and tanh. Only for kernels.cpp to include,
// inside namespace QUIRE_ISA.

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

static inline vf splat(float x) { return x - vf{}; }
static inline vi splat_int(int32_t x) { return x - vi{}; }
// a * b + c, rounded once where the level can: the same wherever it is written, as a sum of products is not.
static inline vf fma_of(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  vf out;
#pragma GCC unroll 4
  for (int i = 0; i < W; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
#else
  return a * b + c;
#endif
}
static inline vf max(vf a, vf b) { return a > b ? a : b; }

static inline vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf_mem*>(p) = x; }

static inline vf load(const bf16* p) {
  const vh bits = *reinterpret_cast<const vh_mem*>(p);
  return (vf)(__builtin_convertvector(bits, vu) << 16);
}

static inline void store(bf16* p, vf x) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const vu quiet = (bits >> 16) | 0x40u;                            // rounding could turn a NaN into infinity
  const vu is_nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector((is_nan & quiet) | (~is_nan & rounded), vh);
}

static inline vf load(const f16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const vu bits = __builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu);
  const vu magnitude = (bits & 0x7fffu) << 13;
  const vu finite = (vu)((vf)magnitude * splat(0x1p112f));  // moves the exponent's bias; right for subnormals too
  const vu is_special = (vu)(magnitude >= (0x7c00u << 13));
  return (vf)(finite | (is_special & 0x7f800000u) | ((bits & 0x8000u) << 16));
#endif
}

static inline void store(f16* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  // Adding a power of two that depends on the exponent lets the adder round at half's precision.
  // Source: M. Dukhan, FP16 library, fp16_ieee_from_fp32_value.
  const vu bits = (vu)x;
  const vu doubled = bits + bits;
  const vf base = ((vf)(bits & 0x7fffffffu) * splat(0x1p112f)) * splat(0x1p-110f);
  const vu exponent = doubled & 0xff000000u;
  const vu is_small = (vu)(exponent < 0x71000000u);
  const vu bias = (is_small & 0x71000000u) | (~is_small & exponent);
  const vu sum = (vu)((vf)((bias >> 1) + 0x07800000u) + base);
  const vu number = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  const vu is_nan = (vu)(doubled > 0xff000000u);
  const vu result = ((bits >> 16) & 0x8000u) | (is_nan & 0x7e00u) | (~is_nan & number);
  *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector(result, vh);
#endif
}

// W bytes as whole numbers. GCC 12 widens them one by one where it is left to choose.
static inline vi load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t vb __attribute__((vector_size(W), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const vb*>(p), vi);
#endif
}

// Whole numbers within [-128, 127] as W bytes.
static inline void store_bytes(int8_t* p, vi x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#elif defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  const __m128i words = _mm_packs_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
#else
  typedef int8_t vq __attribute__((vector_size(W), aligned(1), may_alias));
  *reinterpret_cast<vq*>(p) = __builtin_convertvector(x, vq);
#endif
}

// The first n < W elements; the rest are zero.
template <class T>
static inline vf load_part(const T* p, int n) {
  T padded[W] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

template <class T>
static inline void store_part(T* p, vf x, int n) {
  T padded[W];
  store(padded, x);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}

template <int STEP, int... J>
static inline vf swap_blocks(vf x, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(x, x, (J ^ STEP)...);
}

template <int STEP, class Op>
static inline vf fold(vf x, Op op) {
  x = op(x, swap_blocks<STEP>(x, std::make_integer_sequence<int, W>{}));
  if constexpr (STEP > 1) return fold<STEP / 2>(x, op);
  return x;
}

// In the same order on every call.
static inline float sum_of(vf x) {
  return fold<W / 2>(x, [](vf a, vf b) { return a + b; })[0];
}
static inline float max_of(vf x) { return fold<W / 2>(x, max)[0]; }
static inline int32_t sum_of(vi x) {
  return ((vi)fold<W / 2>((vf)x, [](vf a, vf b) { return (vf)((vi)a + (vi)b); }))[0];
}

// exp for x <= 88; exactly 0 below -87; NaN stays NaN. Source: Cephes, expf (S. Moshier), two units in the last place.
static inline vf exp_of(vf x) {
  const vi is_zero = x < splat(-87.0f);
  x = is_zero ? splat(-87.0f) : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x * splat(1.44269504088896341f) + magic) - magic;
  const vf r = x - n * splat(0.693359375f) - n * splat(-2.12194440e-4f);
  vf y = splat(1.9875691500e-4f);
  y = y * r + splat(1.3981999507e-3f);
  y = y * r + splat(8.3334519073e-3f);
  y = y * r + splat(4.1665795894e-2f);
  y = y * r + splat(1.6666665459e-1f);
  y = y * r + splat(5.0000001201e-1f);
  y = y * (r * r) + r + splat(1.0f);
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return (vf)((vi)(y * (vf)power) & ~is_zero);
}

// By its series near zero, where the formula with exp would cancel; NaN stays NaN.
static inline vf tanh_of(vf x) {
  const vf square = x * x;
  vf series = splat(62.0f / 2835.0f);
  series = series * square - splat(17.0f / 315.0f);
  series = series * square + splat(2.0f / 15.0f);
  series = series * square - splat(1.0f / 3.0f);
  series = series * square * x + x;
  const vf magnitude = (vf)((vi)x & 0x7fffffff);
  const vf capped = magnitude > splat(10.0f) ? splat(10.0f) : magnitude;
  const vf large = splat(1.0f) - splat(2.0f) / (exp_of(capped + capped) + splat(1.0f));
  const vf signed_large = (vf)((vi)large | ((vi)x & (int32_t)0x80000000));
  return magnitude > splat(0.25f) ? signed_large : series;
}

template <int STEP, int... J>
static inline vf even_blocks(vf a, vf b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & STEP) ? W + J - STEP : J)...);
}
template <int STEP, int... J>
static inline vf odd_blocks(vf a, vf b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, ((J & STEP) ? W + J : J + STEP)...);
}

template <int STEP>
static inline void transpose_step(vf (&rows)[W]) {
  using lanes = std::make_integer_sequence<int, W>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & STEP)) {
      const vf a = rows[i], b = rows[i + STEP];
      rows[i] = even_blocks<STEP>(a, b, lanes{});
      rows[i + STEP] = odd_blocks<STEP>(a, b, lanes{});
    }
}

// W by W, in registers.
static inline void transpose(vf (&rows)[W]) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  if constexpr (W > 4) transpose_step<4>(rows);
  if constexpr (W > 8) transpose_step<8>(rows);
}
