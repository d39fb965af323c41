// Attention over a plain cache in bfloat16 by the instruction that multiplies pairs. Only for attention.h to include, where
// that instruction is.
//
// Queries, keys and values stay in two bytes; the weights of the softmax are rounded to two, as the result will be; sums are
// float32. A few rows at a time meet a tile of keys, so that their scores never leave the first cache.

constexpr int PAIR_ROWS = 6;

typedef uint32_t vu_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));

// c[MR, NV * W] = (IS_SUM ? c : 0) + a[MR, 2 depth] b[2 depth, NV * W]; a word of a or b is two neighbours in depth.
template <int MR, int NV, bool IS_SUM>
static inline void multiply_pair_tile(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                                      int64_t depth) {
  __m512 acc[MR][NV];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = IS_SUM ? _mm512_loadu_ps(c + i * ldc + j * W) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __m512i row[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = _mm512_loadu_si512(b + k * ldb + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const __m512i factor = _mm512_set1_epi32(int(a[i * lda + k]));
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)factor, (__m512bh)row[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) _mm512_storeu_ps(c + i * ldc + j * W, acc[i][j]);
}

// For MR rows: columns is a multiple of W.
template <int MR, bool IS_SUM>
static inline void multiply_pairs(const uint32_t* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c, int64_t ldc,
                                  int64_t columns, int64_t depth) {
  int64_t j = 0;
  for (; j + 4 * W <= columns; j += 4 * W) multiply_pair_tile<MR, 4, IS_SUM>(a, lda, b + j, ldb, c + j, ldc, depth);
  if (j + 2 * W <= columns) {
    multiply_pair_tile<MR, 2, IS_SUM>(a, lda, b + j, ldb, c + j, ldc, depth);
    j += 2 * W;
  }
  if (j < columns) multiply_pair_tile<MR, 1, IS_SUM>(a, lda, b + j, ldb, c + j, ldc, depth);
}

// -------------------------------------------------------------------------------------------------------- packing

// Words of a row of so many numbers of two bytes, padded with zeros.
static inline int64_t words_of(int64_t size) { return round_up(size, 2 * W) / 2; }

// Numbers [d, d + 2W) of a row of `size`; zero beyond.
static inline __m512i load_words(const bf16* row, int64_t d, int64_t size) {
  const __mmask32 mask = size - d >= 2 * W ? __mmask32(-1) : __mmask32((1u << (size - d)) - 1u);
  return _mm512_maskz_loadu_epi16(mask, row + d);
}

// Not scaled: the scores will be.
static void pack_query_pairs(const AttentionArgs& a, const Item& item, uint32_t* q) {
  const int64_t width = words_of(a.head_size);
  const int64_t token0 = a.query_start_loc[item.request] + item.first_token;
  for (int64_t t = 0; t < item.num_tokens; ++t)
    for (int64_t h = 0; h < item.num_heads; ++h, q += width) {
      const bf16* from = static_cast<const bf16*>(a.q) + (token0 + t) * a.q_token_stride +
                         (item.first_head + h) * a.q_head_stride;
      for (int64_t d = 0; d < a.head_size; d += 2 * W) _mm512_storeu_si512(q + d / 2, load_words(from, d, a.head_size));
    }
}

// keys[d / 2, i] holds rows[i][d] and rows[i][d + 1], for the groups of W keys in [first, last); zero where there is no row.
static void pack_key_pairs(const CacheRows<bf16>& rows, int first, int last, int64_t size, uint32_t* keys) {
  for (int i = first; i < last; i += W)
    for (int64_t d = 0; d < size; d += 2 * W) {
      vf square[W];
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) square[j] = rows.at[i + j] ? (vf)load_words(rows.at[i + j], d, size) : vf{};
      transpose(square);
#pragma GCC unroll 16
      for (int j = 0; j < W; ++j) *reinterpret_cast<vu_mem*>(keys + (d / 2 + j) * PAIR_KEYS + i) = (vu)square[j];
    }
}

// values[i / 2, d] holds rows[i][d] and rows[i + 1][d], for the keys in [first, last), both even.
static void pack_value_pairs(const CacheRows<bf16>& rows, int first, int last, int64_t size, uint32_t* values) {
  const int64_t width = round_up(size, W);
  alignas(64) uint16_t order[2][2 * W];
  for (int i = 0; i < 2 * W; ++i) {
    order[0][i] = uint16_t(i / 2 + (i & 1) * 2 * W);
    order[1][i] = uint16_t(i / 2 + W + (i & 1) * 2 * W);
  }
  const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
  for (int i = first; i < last; i += 2)
    for (int64_t d = 0; d < size; d += 2 * W) {
      const __m512i even = rows.at[i] ? load_words(rows.at[i], d, size) : _mm512_setzero_si512();
      const __m512i odd = rows.at[i + 1] ? load_words(rows.at[i + 1], d, size) : _mm512_setzero_si512();
      uint32_t* to = values + i / 2 * width + d;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      if (d + W < width) _mm512_storeu_si512(to + W, _mm512_permutex2var_epi16(even, high, odd));
    }
}

// -------------------------------------------------------------------------------------------------------- softmax

// 2^x for x <= 127, to four millionths: far below the half of a place of bfloat16. NaN stays NaN, and 0 is exactly 1.
static inline vf power_of_two(vf x) {
  const __m512 bounded = _mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // in this order it keeps NaN
  const __m512 whole = _mm512_roundscale_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = (vf)_mm512_sub_ps(bounded, whole);
  vf y = splat(9.5828700e-3f);
  y = y * r + splat(5.5906430e-2f);
  y = y * r + splat(2.4024098e-1f);
  y = y * r + splat(6.9312419e-1f);
  y = y * r + splat(1.0f);
  return (vf)_mm512_scalef_ps((__m512)y, whole);
}

constexpr float LOG2_E = 1.44269504088896341f;

// What holds for all rows of a tile of keys.
struct PairTile {
  int64_t tile, position0;
  int first, last;
  bool is_plain;  // a score is the product times the scale, and the scale keeps the order
};

// As soften_row, of products that are not scaled yet; the weights go to `shares` in bfloat16. A masked row and a whole one
// go through the same roundings: which of them a row is depends on its company.
static inline float soften_pairs(const AttentionArgs& a, const PairTile& t, int64_t position, float slope, float* scores,
                                 uint16_t* shares, float* max_so_far, float* sum_so_far) {
  const Visible visible = visible_at(a, position);
  const bool is_whole = visible.begin <= t.tile + t.first && visible.end >= t.tile + t.last;
  const float minus_infinity = -__builtin_inff();
  vf largest = splat(minus_infinity);
  if (t.is_plain && is_whole) {
    for (int i = t.first; i < t.last; i += W) largest = max(largest, load(scores + i));
  } else {
    const vf lanes = lane_numbers();
    for (int i = t.first; i < t.last; i += W) {
      vf s = load(scores + i);
      if (!t.is_plain) {
        s *= splat(a.scale);
        if (a.soft_cap > 0) s = splat(a.soft_cap) * tanh_of(s / splat(a.soft_cap));
        if (slope != 0) s += splat(slope) * (lanes + splat(float(t.tile + i - position)));
      }
      const vf key = lanes + splat(float(i));
      const vi is_hidden = (key < splat(float(visible.begin - t.tile))) | (key >= splat(float(visible.end - t.tile)));
      s = is_hidden ? splat(minus_infinity) : s;
      store(scores + i, s);
      largest = max(largest, s);
    }
  }
  const float scale = t.is_plain ? a.scale : 1.0f;
  const float row_max = max_of(largest) * scale;
  const float old_max = *max_so_far;
  const float new_max = row_max > old_max ? row_max : old_max;
  const float shift = new_max == minus_infinity ? 0.0f : new_max;
  const vf factor = splat(scale * LOG2_E), less = splat(shift * LOG2_E);
  vf sum{};
  for (int i = t.first; i < t.last; i += W) {
    const vf p = power_of_two((vf)_mm512_fmsub_ps((__m512)load(scores + i), (__m512)factor, (__m512)less));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(shares + i), (__m256i)_mm512_cvtneps_pbh((__m512)p));
    sum += p;
  }
  const float decay = new_max == old_max ? 1.0f : exp_of(splat(old_max - shift))[0];
  *max_so_far = new_max;
  *sum_so_far = *sum_so_far * decay + sum_of(sum);
  return decay;
}

// ----------------------------------------------------------------------------------------------------------- spans

// MR rows, from `row` on, against one packed tile of keys and values.
template <int MR>
static void attend_rows(const AttentionArgs& a, const Item& item, const PairTile& t, int64_t row, const uint32_t* q,
                        const uint32_t* keys, const uint32_t* values, float* scores, const Partial& result) {
  const int64_t words = words_of(a.head_size), width = round_up(a.v_head_size, W);
  alignas(64) uint32_t shares[MR][PAIR_KEYS / 2];
  multiply_pairs<MR, false>(q + row * words, words, keys + t.first, PAIR_KEYS, scores + t.first, PAIR_KEYS, t.last - t.first, words);
  for (int i = 0; i < MR; ++i) {
    const int64_t token = (row + i) / item.num_heads, head = item.first_head + (row + i) % item.num_heads;
    const float slope = a.alibi_slopes ? a.alibi_slopes[head] : 0.0f;
    const float decay = soften_pairs(a, t, t.position0 + token, slope, scores + i * PAIR_KEYS,
                                     reinterpret_cast<uint16_t*>(shares[i]), result.max + row + i, result.sum + row + i);
    if (decay == 1.0f) continue;
    float* out = result.out + (row + i) * width;
    for (int64_t d = 0; d < width; d += W) store(out + d, load(out + d) * splat(decay));
  }
  multiply_pairs<MR, true>(shares[0] + t.first / 2, PAIR_KEYS / 2, values + t.first / 2 * width, width, result.out + row * width,
                           width, width, (t.last - t.first) / 2);
}

// The rows of an item against one packed tile.
static void attend_pairs(const AttentionArgs& a, const Item& item, const PairTile& t, const Scratch& s, const Partial& result) {
  const int64_t rows = int64_t(item.num_tokens) * item.num_heads;
  const uint32_t* q = reinterpret_cast<const uint32_t*>(s.q);
  const uint32_t* keys = reinterpret_cast<const uint32_t*>(s.keys);
  const uint32_t* values = reinterpret_cast<const uint32_t*>(s.values);
  int64_t tiles = (rows + PAIR_ROWS - 1) / PAIR_ROWS;
  for (int64_t i = 0; i < rows; --tiles) {
    const int64_t n = (rows - i + tiles - 1) / tiles;
    switch (n) {
      case 6: attend_rows<6>(a, item, t, i, q, keys, values, s.scores, result); break;
      case 5: attend_rows<5>(a, item, t, i, q, keys, values, s.scores, result); break;
      case 4: attend_rows<4>(a, item, t, i, q, keys, values, s.scores, result); break;
      case 3: attend_rows<3>(a, item, t, i, q, keys, values, s.scores, result); break;
      case 2: attend_rows<2>(a, item, t, i, q, keys, values, s.scores, result); break;
      default: attend_rows<1>(a, item, t, i, q, keys, values, s.scores, result); break;
    }
    i += n;
  }
}
