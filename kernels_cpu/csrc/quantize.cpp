// The quantizing of weights, compiled once for each ISA level, by the same rules as kernels.cpp; and with
// -ffp-contract=off, since a product that is fused with a sum would be rounded once where the definition rounds twice.
#include "quantize.h"

#include <cstddef>
#include <utility>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 reports its own _mm512_undefined_ps
#endif
#if defined(__x86_64__) && defined(__AVX2__)
#include <immintrin.h>
#endif

#define QUIRE_CAT_(a, b) a##b
#define QUIRE_CAT(a, b) QUIRE_CAT_(a, b)

namespace quire {
namespace QUIRE_ISA {
namespace {
#include "vectors.h"

typedef uint64_t pairs __attribute__((vector_size(W * 4)));
typedef uint8_t bytes __attribute__((vector_size(W)));
typedef uint8_t bytes_mem __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint8_t half_bytes __attribute__((vector_size(W / 2)));
typedef uint8_t half_bytes_mem __attribute__((vector_size(W / 2), aligned(1), may_alias));

constexpr float MOST_INT8 = 127.0f, MOST_INT4 = 15.0f;
constexpr float LEAST_SCALE = 0x1p-126f;  // a smaller one has no reciprocal
constexpr int NUM_PARTS = 6, PADDED_PARTS = 8;
constexpr double PARTS[PADDED_PARTS] = {1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.75, 0.75};

// To whole numbers, halves to even, for magnitudes below 2^22; larger ones stay large.
template <class V>
inline V nearest(V x) {
  return (x + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23
}

// NaN becomes the least.
inline vf clamp(vf x, float least, float most) {
  x = x > splat(least) ? x : splat(least);
  return x > splat(most) ? splat(most) : x;
}

inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// --- 8 bits ---------------------------------------------------------------------------------------

inline vi int8_codes(vf x, float divisor) {
  return __builtin_convertvector(clamp(nearest(x / splat(divisor)), -MOST_INT8, MOST_INT8), vi) + 128;
}

template <class T>
void int8_row(const T* row, int64_t n, uint8_t* codes, float* scale) {
  const int64_t whole = n / W * W;
  const int rest = int(n - whole);
  vf largest = splat(0.0f);
  for (int64_t i = 0; i < whole; i += W) largest = max(largest, magnitude(load(row + i)));
  if (rest) largest = max(largest, magnitude(load_part(row + whole, rest)));
  *scale = max_of(largest) / MOST_INT8;
  const float divisor = *scale == 0.0f ? 1.0f : *scale;
  for (int64_t i = 0; i < whole; i += W)
    *reinterpret_cast<bytes_mem*>(codes + i) = __builtin_convertvector(int8_codes(load(row + i), divisor), bytes);
  if (rest) {
    const vi last = int8_codes(load_part(row + whole, rest), divisor);
    for (int i = 0; i < rest; ++i) codes[whole + i] = uint8_t(last[i]);
  }
}

template <class T>
void int8_rows(const QuantizeArgs& a) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < a.num_outputs; ++n)
    int8_row(static_cast<const T*>(a.weight) + n * a.row_stride, a.num_inputs, a.codes + n * a.num_inputs,
             static_cast<float*>(a.scales) + n);
}

// --- 4 bits ---------------------------------------------------------------------------------------

// What the parts of a group's range give.
struct Ranges {
  float scale[PADDED_PARTS], inverse[PADDED_PARTS], zero[PADDED_PARTS];
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline Ranges ranges_of(float low, float high) {
  Ranges r;
  const float span = float_of(bits_of(high - low) & 0x7fffffffu);
  for (int p = 0; p < PADDED_PARTS; ++p) {
    const uint32_t bits = bits_of(span * float(PARTS[p] / double(MOST_INT4)));
    const float rounded = float_of((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);  // to bfloat16
    const float scale = rounded < LEAST_SCALE ? 0.0f : rounded;
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    const float zero = nearest(-low * float(PARTS[p]) * inverse);
    r.scale[p] = scale, r.inverse[p] = inverse;
    r.zero[p] = zero > MOST_INT4 ? MOST_INT4 : zero > 0.0f ? zero : 0.0f;
  }
  return r;
}

inline vf int4_codes(vf x, float inverse, float zero) {
  return clamp(nearest(x * splat(inverse)) + splat(zero), 0.0f, MOST_INT4);
}

// The sum of squares of what decoding is off by; the second half of the terms is added to the first until one is left.
template <int VECTORS>
inline float error_of(const vf (&x)[VECTORS], float scale, float inverse, float zero) {
  vf terms[VECTORS];
#pragma GCC unroll 32
  for (int i = 0; i < VECTORS; ++i) {
    const vf off = (int4_codes(x[i], inverse, zero) - splat(zero)) * splat(scale) - x[i];
    terms[i] = off * off;
  }
#pragma GCC unroll 8
  for (int half = VECTORS / 2; half > 0; half /= 2)
#pragma GCC unroll 32
    for (int i = 0; i < half; ++i) terms[i] = terms[i] + terms[i + half];
  return sum_of(terms[0]);
}

template <class T, int SIZE>
inline void int4_group(const T* weights, uint8_t* codes, uint16_t* scale, uint8_t* zero) {
  constexpr int VECTORS = SIZE / W;
  vf x[VECTORS];
  vf low = splat(0.0f), high = splat(0.0f);
#pragma GCC unroll 32
  for (int i = 0; i < VECTORS; ++i) {
    x[i] = load(weights + i * W);
    low = x[i] < low ? x[i] : low;
    high = max(high, x[i]);
  }
  const Ranges ranges = ranges_of(-max_of(-low), max_of(high));
  float best_error = __builtin_inff(), best_scale = 0.0f, best_inverse = 0.0f, best_zero = 0.0f;
  for (int p = 0; p < NUM_PARTS; ++p) {
    const float error = error_of(x, ranges.scale[p], ranges.inverse[p], ranges.zero[p]);
    if (error < best_error)
      best_error = error, best_scale = ranges.scale[p], best_inverse = ranges.inverse[p], best_zero = ranges.zero[p];
  }
  *scale = uint16_t(bits_of(best_scale) >> 16);
  *zero = uint8_t(best_zero);
#pragma GCC unroll 32
  for (int i = 0; i < VECTORS; ++i) {
    const pairs both = (pairs)__builtin_convertvector(int4_codes(x[i], best_inverse, best_zero), vi);
    const pairs packed = (both | both >> 28) & 0xffu;  // the later input of each two to the high half
    *reinterpret_cast<half_bytes_mem*>(codes + i * W / 2) = __builtin_convertvector(packed, half_bytes);
  }
}

template <class T, int SIZE>
void int4_rows(const QuantizeArgs& a) {
  const int64_t groups = a.num_inputs / SIZE;
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < a.num_outputs; ++n)
    for (int64_t g = 0; g < groups; ++g)
      int4_group<T, SIZE>(static_cast<const T*>(a.weight) + n * a.row_stride + g * SIZE,
                          a.codes + (n * a.num_inputs + g * SIZE) / 2,
                          static_cast<uint16_t*>(a.scales) + n * groups + g, a.zeros + n * groups + g);
}

template <class T>
void int4_of(const QuantizeArgs& a) {
  if (a.group_size == 16) return int4_rows<T, 16>(a);
  if (a.group_size == 32) return int4_rows<T, 32>(a);
  if (a.group_size == 64) return int4_rows<T, 64>(a);
  int4_rows<T, 128>(a);
}

// --------------------------------------------------------------------------------------------------

void quantize_int8(const QuantizeArgs& a) {
  if (a.dtype == DType::f32) return int8_rows<float>(a);
  if (a.dtype == DType::bf16) return int8_rows<bf16>(a);
  int8_rows<f16>(a);
}

void quantize_int4(const QuantizeArgs& a) {
  if (a.dtype == DType::f32) return int4_of<float>(a);
  if (a.dtype == DType::bf16) return int4_of<bf16>(a);
  int4_of<f16>(a);
}
}  // namespace
}  // namespace QUIRE_ISA

extern const QuantizeTable QUIRE_CAT(quantize_, QUIRE_ISA);
const QuantizeTable QUIRE_CAT(quantize_, QUIRE_ISA) = {QUIRE_ISA::quantize_int8, QUIRE_ISA::quantize_int4};
}  // namespace quire
