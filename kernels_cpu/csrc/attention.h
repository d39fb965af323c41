// Paged attention. Only for kernels.cpp to include, inside namespace QUIRE_ISA.
//
// An Item is one tile of query rows (some tokens times the query heads that share one key head) against its whole context.
// The context is cut at absolute positions, into spans of SPAN keys and within them into tiles of KEYS keys, and the spans
// are merged in order. So a row's result depends neither on the other rows of its tile, nor on the batch, nor on how a
// prompt was cut into chunks, nor on the number of threads: only whether spans are computed by one thread or by several.
//
// Source: block-wise softmax: Milakov & Gimelshein 2018; the merge of spans: Dao et al. 2023 (Flash-Decoding).

constexpr int KEYS = 64;   // keys of a tile: the packed tile of keys and that of values stay in the first cache
constexpr int SPAN = 512;  // keys of a span: the unit of work when one long context is shared by threads
constexpr int ROWS = 128;  // rows of a query tile, at most

#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;
#else
constexpr bool HAS_PAIRS = false;
#endif
constexpr int PAIR_KEYS = 256;  // keys of a tile of pairs: half of the bytes, and more keys for each step of the softmax
constexpr int TILE_WORDS = HAS_PAIRS ? PAIR_KEYS / 2 : KEYS;  // what a tile takes of a feature, in either form

// Whether a cache of C is multiplied by the instruction for pairs of bfloat16; queries have the dtype of a plain cache.
template <class C>
constexpr bool by_pairs() {
  return HAS_PAIRS && std::is_same_v<C, bf16>;
}

template <class C>
constexpr int keys_of() {
  return by_pairs<C>() ? PAIR_KEYS : KEYS;
}

struct Item {
  int32_t request;
  int32_t kv_head;
  int32_t first_head, num_heads;    // the query heads of this tile, all of kv_head's group
  int32_t first_token, num_tokens;  // within the request's new tokens
  int64_t first_key, end_key;       // what at least one row sees
  int64_t first_span, num_spans;    // first_span counts over all items: where the partial results lie
};

// What the rows of a tile see: keys [begin, end).
struct Visible {
  int64_t begin, end;
};

static inline Visible visible_at(const AttentionArgs& a, int64_t position) {
  int64_t begin = 0;
  if (a.window > 0 && position - a.window + 1 > begin) begin = position - a.window + 1;
  if (a.chunk > 0 && position / a.chunk * a.chunk > begin) begin = position / a.chunk * a.chunk;
  return {begin, position + 1};
}

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// The state of the softmax of some rows: max, sum of exp, and the weighted sum of values, not yet divided.
struct Partial {
  float* max;  // [ROWS]
  float* sum;  // [ROWS]
  float* out;  // [ROWS, padded v_head_size]
};

static inline int64_t partial_floats(const AttentionArgs& a) { return ROWS * (2 + round_up(a.v_head_size, W)); }
static inline Partial partial_at(float* memory) { return {memory, memory + ROWS, memory + 2 * ROWS}; }

struct Scratch {
  float* q;       // [ROWS, padded head_size], scaled; of pairs: half of it, not scaled
  float* keys;    // [padded head_size, KEYS]: transposed; of pairs: [half of it, PAIR_KEYS]
  float* values;  // [KEYS, padded v_head_size]; of pairs: [PAIR_KEYS / 2, padded v_head_size]
  float* scores;  // [ROWS, KEYS]
  Partial span, total;
};

static inline int64_t scratch_floats(const AttentionArgs& a) {
  const int64_t d = round_up(a.head_size, 2 * W), dv = round_up(a.v_head_size, W);
  return (ROWS + TILE_WORDS) * d + TILE_WORDS * dv + ROWS * KEYS + 2 * partial_floats(a);
}

static inline Scratch scratch_at(const AttentionArgs& a, float* memory) {
  const int64_t d = round_up(a.head_size, 2 * W), dv = round_up(a.v_head_size, W);
  Scratch s;
  s.q = memory;
  s.keys = s.q + ROWS * d;
  s.values = s.keys + d * TILE_WORDS;
  s.scores = s.values + TILE_WORDS * dv;
  s.span = partial_at(s.scores + ROWS * KEYS);
  s.total = partial_at(s.span.max + partial_floats(a));
  return s;
}

#include "attention_products.h"

// -------------------------------------------------------------------------------------------------------- packing

template <class T>
static void pack_queries(const AttentionArgs& a, const Item& item, float* q) {
  const int64_t width = round_up(a.head_size, W);
  const int64_t token0 = a.query_start_loc[item.request] + item.first_token;
  const vf scale = splat(a.scale);
  for (int64_t t = 0; t < item.num_tokens; ++t)
    for (int64_t h = 0; h < item.num_heads; ++h, q += width) {
      const T* from = static_cast<const T*>(a.q) + (token0 + t) * a.q_token_stride +
                      (item.first_head + h) * a.q_head_stride;
      int64_t d = 0;
      for (; d + W <= a.head_size; d += W) store(q + d, load(from + d) * scale);
      if (d < a.head_size) store(q + d, load_part(from + d, int(a.head_size - d)) * scale);
    }
}

#include "cache_rows.h"

// -------------------------------------------------------------------------------------------------------- softmax

static inline vf lane_numbers() {
  vf lanes;
  for (int i = 0; i < W; ++i) lanes[i] = float(i);
  return lanes;
}

// One row of scores of the tile of keys that starts at `tile`: cap, bias and mask; then exp against the running max, in
// place. Only columns [first, last), multiples of W, hold scores. Returns by what the row's earlier results are to be
// multiplied.
static inline float soften_row(const AttentionArgs& a, float* scores, int first, int last, int64_t tile, int64_t position,
                               float slope, float* max_so_far, float* sum_so_far) {
  const Visible visible = visible_at(a, position);
  const bool is_whole = visible.begin <= tile + first && visible.end >= tile + last;
  const float minus_infinity = -__builtin_inff();
  const vf lanes = lane_numbers();
  vf largest = splat(minus_infinity);
  for (int i = first; i < last; i += W) {
    vf s = load(scores + i);
    if (a.soft_cap > 0) s = splat(a.soft_cap) * tanh_of(s / splat(a.soft_cap));
    if (slope != 0) s += splat(slope) * (lanes + splat(float(tile + i - position)));
    if (!is_whole) {  // the differences are small enough for float
      const vf key = lanes + splat(float(i));
      const vi is_hidden = (key < splat(float(visible.begin - tile))) | (key >= splat(float(visible.end - tile)));
      s = is_hidden ? splat(minus_infinity) : s;
    }
    store(scores + i, s);
    largest = max(largest, s);
  }
  const float row_max = max_of(largest);
  const float old_max = *max_so_far;
  const float new_max = row_max > old_max ? row_max : old_max;
  // A row that sees nothing yet: any finite number will do, exp(-inf - 0) is 0.
  const vf shift = splat(new_max == minus_infinity ? 0.0f : new_max);
  vf sum{};
  for (int i = first; i < last; i += W) {
    const vf p = exp_of(load(scores + i) - shift);
    store(scores + i, p);
    sum += p;
  }
  const float decay = new_max == old_max ? 1.0f : exp_of(splat(old_max) - shift)[0];
  *max_so_far = new_max;
  *sum_so_far = *sum_so_far * decay + sum_of(sum);
  return decay;
}

static void soften(const AttentionArgs& a, const Item& item, int first, int last, int64_t tile, int64_t position0,
                   float* scores, const Partial& span) {
  const int64_t width = round_up(a.v_head_size, W);
  int64_t row = 0;
  for (int64_t t = 0; t < item.num_tokens; ++t)
    for (int64_t h = 0; h < item.num_heads; ++h, ++row) {
      const float slope = a.alibi_slopes ? a.alibi_slopes[item.first_head + h] : 0.0f;
      const float decay = soften_row(a, scores + row * KEYS, first, last, tile, position0 + t, slope, span.max + row,
                                     span.sum + row);
      if (decay == 1.0f) continue;
      float* out = span.out + row * width;
      for (int64_t d = 0; d < width; d += W) store(out + d, load(out + d) * splat(decay));
    }
}

// ----------------------------------------------------------------------------------------------------------- spans

static inline void clear(const Partial& partial, int64_t rows, int64_t width) {
  for (int64_t i = 0; i < rows; ++i) partial.max[i] = -__builtin_inff(), partial.sum[i] = 0.0f;
  for (int64_t i = 0; i < rows * width; i += W) store(partial.out + i, vf{});
}

#if defined(__AVX512BF16__)
#include "attention_pairs.h"
#endif

template <class T, class C>
static inline void prepare_queries(const AttentionArgs& a, const Item& item, const Scratch& s) {
#if defined(__AVX512BF16__)
  if constexpr (by_pairs<C>()) return pack_query_pairs(a, item, reinterpret_cast<uint32_t*>(s.q));
#endif
  pack_queries<T>(a, item, s.q);
}

template <class C>
static inline void pack_tile(const AttentionArgs& a, const CacheRows<C>& keys, int skipped, int stop, float* to) {
  const int first = skipped / W * W, last = int(round_up(stop, W));
#if defined(__AVX512BF16__)
  if constexpr (by_pairs<C>()) return pack_key_pairs(keys, first, last, a.head_size, reinterpret_cast<uint32_t*>(to));
#endif
  pack_keys(keys, first, last, a.head_size, to);
}

// One tile of keys: [from, to) of them are there, and the next ones are asked for meanwhile.
struct KeyTile {
  int64_t tile, position0;
  int skipped, stop;
};

template <class C>
static inline void attend_wide(const AttentionArgs& a, const Item& item, const KeyTile& t, const CacheRows<C>& values,
                               const Scratch& s, const Partial& result) {
  const int64_t rows = int64_t(item.num_tokens) * item.num_heads;
  const int64_t width = round_up(a.head_size, W), v_width = round_up(a.v_head_size, W);
  const int first = t.skipped / W * W, last = int(round_up(t.stop, W));
  multiply<false>(s.q, width, s.keys + first, KEYS, s.scores + first, KEYS, rows, last - first, width);
  soften(a, item, first, last, t.tile, t.position0, s.scores, result);
  pack_values(values, t.skipped, t.stop, a.v_head_size, s.values);
  multiply<true>(s.scores + t.skipped, KEYS, s.values + t.skipped * v_width, v_width, result.out, v_width, rows, v_width,
                 t.stop - t.skipped);
}

// Scores, softmax and values of one tile, whose keys are packed.
template <class C>
static inline void attend_tile(const AttentionArgs& a, const Item& item, const KeyTile& t, const CacheRows<C>& values,
                               const Scratch& s, const Partial& result) {
#if defined(__AVX512BF16__)
  if constexpr (by_pairs<C>()) {
    const int first = t.skipped / W * W, last = int(round_up(t.stop, W));
    pack_value_pairs(values, first, last, a.v_head_size, reinterpret_cast<uint32_t*>(s.values));
    const bool is_plain = a.soft_cap <= 0 && !a.alibi_slopes && a.scale > 0;
    return attend_pairs(a, item, {t.tile, t.position0, first, last, is_plain}, s, result);
  }
#endif
  attend_wide(a, item, t, values, s, result);
}

// The attention of the item's rows over the keys of one span: s.q is packed, s.span is written.
template <class C>
static void attend_span(const AttentionArgs& a, const Item& item, int64_t span, const Scratch& s, const Partial& result) {
  const int64_t rows = int64_t(item.num_tokens) * item.num_heads;
  const int64_t num_new = a.query_start_loc[item.request + 1] - a.query_start_loc[item.request];
  const int64_t position0 = a.seq_lens[item.request] - num_new + item.first_token;
  const int64_t begin = span * SPAN > item.first_key ? span * SPAN : item.first_key;
  const int64_t end = (span + 1) * SPAN < item.end_key ? (span + 1) * SPAN : item.end_key;
  clear(result, rows, round_up(a.v_head_size, W));
  constexpr int STEP = keys_of<C>();
  CacheRows<C> keys, values[2];
  const CacheOf k{a.k_cache, a.k_scales, a.k_block_stride, a.k_slot_stride, a.k_head_stride};
  const CacheOf v{a.v_cache, a.v_scales, a.v_block_stride, a.v_slot_stride, a.v_head_stride};
  int64_t tile = begin / STEP * STEP, from = begin, to = tile + STEP < end ? tile + STEP : end;
  find_rows(a, item, k, tile, from, to, keys);
  find_rows(a, item, v, tile, from, to, values[0]);
  prefetch_rows(keys, int(from - tile), int(to - tile), a.head_size);
  prefetch_rows(values[0], int(from - tile), int(to - tile), a.v_head_size);
  for (int turn = 0; tile < end; tile += STEP, turn ^= 1) {
    const int skipped = int(from - tile), stop = int(to - tile);
    pack_tile(a, keys, skipped, stop, s.keys);
    from = to, to = to + STEP < end ? to + STEP : end;
    find_rows(a, item, k, tile + STEP, from, to, keys);
    find_rows(a, item, v, tile + STEP, from, to, values[turn ^ 1]);
    prefetch_rows(keys, 0, int(to - from), a.head_size);
    prefetch_rows(values[turn ^ 1], 0, int(to - from), a.v_head_size);
    attend_tile(a, item, {tile, position0, skipped, stop}, values[turn], s, result);
  }
}

// total = total and span together.
static void merge(const AttentionArgs& a, int64_t rows, const Partial& span, const Partial& total) {
  const int64_t width = round_up(a.v_head_size, W);
  for (int64_t row = 0; row < rows; ++row) {
    const float old_max = total.max[row];
    const float new_max = span.max[row] > old_max ? span.max[row] : old_max;
    if (new_max == -__builtin_inff() && span.sum[row] == 0.0f) continue;  // nothing seen yet
    const float keep = exp_of(splat(old_max - new_max))[0], take = exp_of(splat(span.max[row] - new_max))[0];
    total.max[row] = new_max;
    total.sum[row] = total.sum[row] * keep + span.sum[row] * take;
    float* out = total.out + row * width;
    const float* more = span.out + row * width;
    for (int64_t d = 0; d < width; d += W)
      store(out + d, load(out + d) * splat(keep) + load(more + d) * splat(take));
  }
}

// By what the weighted sum of values is to be multiplied. A sink is one more score of the softmax, with no value.
static inline float share_of_values(const AttentionArgs& a, int64_t head, float row_max, float sum) {
  if (!a.sinks) return 1.0f / sum;
  const float sink = a.sinks[head];
  const float largest = sink > row_max ? sink : row_max;
  const float keep = exp_of(splat(row_max - largest))[0];
  return keep / (sum * keep + exp_of(splat(sink - largest))[0]);
}

template <class T>
static void write_rows(const AttentionArgs& a, const Item& item, const Partial& total) {
  const int64_t width = round_up(a.v_head_size, W);
  const int64_t token0 = a.query_start_loc[item.request] + item.first_token;
  int64_t row = 0;
  for (int64_t t = 0; t < item.num_tokens; ++t)
    for (int64_t h = 0; h < item.num_heads; ++h, ++row) {
      const int64_t head = item.first_head + h;
      const vf factor = splat(share_of_values(a, head, total.max[row], total.sum[row]));
      T* to = static_cast<T*>(a.out) + (token0 + t) * a.out_token_stride + head * a.out_head_stride;
      const float* from = total.out + row * width;
      int64_t d = 0;
      for (; d + W <= a.v_head_size; d += W) store(to + d, load(from + d) * factor);
      if (d < a.v_head_size) store_part(to + d, load(from + d) * factor, int(a.v_head_size - d));
    }
}

// ------------------------------------------------------------------------------------------------------------ work

static inline int64_t tokens_of_tile(int64_t heads) { return ROWS / heads; }

// Lists the items in `items`, or only counts them where that is null.
static int64_t list_items(const AttentionArgs& a, Item* items) {
  const int64_t group = a.num_heads / a.num_kv_heads;
  const int64_t heads_of_tile = group < ROWS ? group : ROWS;
  int64_t count = 0, num_spans = 0;
  for (int64_t r = 0; r < a.num_requests; ++r) {
    const int64_t num_new = a.query_start_loc[r + 1] - a.query_start_loc[r];
    const int64_t num_old = a.seq_lens[r] - num_new;
    const int64_t step = tokens_of_tile(heads_of_tile);
    for (int64_t token = 0; token < num_new; token += step)
      for (int64_t head = 0, heads; head < a.num_heads; head += heads, ++count) {
        const int64_t kv_head = head / group, end_of_group = (kv_head + 1) * group;
        heads = end_of_group - head < heads_of_tile ? end_of_group - head : heads_of_tile;
        const int64_t tokens = num_new - token < step ? num_new - token : step;
        if (items) {
          Item& item = items[count];
          item.request = int32_t(r), item.kv_head = int32_t(kv_head);
          item.first_head = int32_t(head), item.num_heads = int32_t(heads);
          item.first_token = int32_t(token), item.num_tokens = int32_t(tokens);
          item.first_key = visible_at(a, num_old + token).begin;
          item.end_key = num_old + token + tokens;
          item.first_span = num_spans;
          item.num_spans = (item.end_key + SPAN - 1) / SPAN - item.first_key / SPAN;
          num_spans += item.num_spans;
        }
      }
  }
  return count;
}

// Each item by one thread.
template <class T, class C>
static bool attend_by_items(const AttentionArgs& a, const Item* items, int64_t num_items, int num_threads) {
  bool has_memory = true;
  int64_t next = num_items;  // the last tiles of a prompt see the most keys: they come first
  auto attend_items = [&](int) {
    float* memory = static_cast<float*>(__builtin_malloc(size_t(scratch_floats(a)) * sizeof(float)));
    if (!memory) __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    for (int64_t i; memory && (i = __atomic_sub_fetch(&next, 1, __ATOMIC_RELAXED)) >= 0;) {
      const Item& item = items[i];
      const Scratch s = scratch_at(a, memory);
      const int64_t rows = int64_t(item.num_tokens) * item.num_heads;
      prepare_queries<T, C>(a, item, s);
      const int64_t span0 = item.first_key / SPAN;
      attend_span<C>(a, item, span0, s, s.total);
      for (int64_t span = 1; span < item.num_spans; ++span) {
        attend_span<C>(a, item, span0 + span, s, s.span);
        merge(a, rows, s.span, s.total);
      }
      write_rows<T>(a, item, s.total);
    }
    __builtin_free(memory);
  };
  spread(a.team, num_threads, attend_items);
  return has_memory;
}

// Each span of each item by one thread, then the merges: for a few requests with long contexts.
template <class T, class C>
static bool attend_by_spans(const AttentionArgs& a, const Item* items, int64_t num_items, int num_threads) {
  const int64_t num_spans = items[num_items - 1].first_span + items[num_items - 1].num_spans;
  const size_t size = size_t(partial_floats(a));
  float* partials = static_cast<float*>(__builtin_malloc(size * size_t(num_spans) * sizeof(float)));
  if (!partials) return false;
  bool has_memory = true;
  int64_t next = 0;
  auto attend_spans = [&](int) {
    float* memory = static_cast<float*>(__builtin_malloc(size_t(scratch_floats(a)) * sizeof(float)));
    if (!memory) __atomic_store_n(&has_memory, false, __ATOMIC_RELAXED);
    int64_t packed = -1;
    for (int64_t unit; memory && (unit = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < num_spans;) {
      int64_t low = 0, high = num_items - 1;  // the item that the span belongs to
      while (low < high) {
        const int64_t middle = (low + high + 1) / 2;
        if (items[middle].first_span <= unit) low = middle;
        else high = middle - 1;
      }
      const Item& item = items[low];
      const Scratch s = scratch_at(a, memory);
      if (packed != low) prepare_queries<T, C>(a, item, s);
      packed = low;
      const int64_t span = item.first_key / SPAN + unit - item.first_span;
      attend_span<C>(a, item, span, s, partial_at(partials + size * size_t(unit)));
    }
    __builtin_free(memory);
  };
  spread(a.team, num_threads, attend_spans);
  int64_t next_item = 0;
  auto merge_items = [&](int) {
    for (int64_t i; (i = __atomic_fetch_add(&next_item, 1, __ATOMIC_RELAXED)) < num_items;) {
      const Item& item = items[i];
      const int64_t rows = int64_t(item.num_tokens) * item.num_heads;
      const Partial total = partial_at(partials + size * size_t(item.first_span));
      for (int64_t span = 1; span < item.num_spans; ++span)
        merge(a, rows, partial_at(partials + size * size_t(item.first_span + span)), total);
      write_rows<T>(a, item, total);
    }
  };
  if (has_memory) spread(a.team, num_threads, merge_items);
  __builtin_free(partials);
  return has_memory;
}

static inline int threads_for(int64_t num_units, int64_t work) {
#if defined(_OPENMP)
  const int64_t useful = work / (1 << 19) + 1;  // a thread should have some ten microseconds to do
  int64_t threads = omp_get_max_threads();
  if (threads > num_units) threads = num_units;
  if (threads > useful) threads = useful;
  return int(threads < 1 ? 1 : threads);
#else
  (void)num_units, (void)work;
  return 1;
#endif
}

constexpr int64_t MAX_PARTIAL_BYTES = 64 << 20;

template <class T, class C>
static bool attend(const AttentionArgs& a) {
  const int64_t num_items = list_items(a, nullptr);
  if (num_items == 0) return true;
  Item* items = static_cast<Item*>(__builtin_malloc(size_t(num_items) * sizeof(Item)));
  if (!items) return false;
  list_items(a, items);
  const int64_t num_spans = items[num_items - 1].first_span + items[num_items - 1].num_spans;
  int64_t work = 0;
  for (int64_t i = 0; i < num_items; ++i)
    work += (items[i].end_key - items[i].first_key) * items[i].num_tokens * items[i].num_heads;
  work *= a.head_size + a.v_head_size;
  const int threads = threads_for(num_spans, work);
  const bool is_uneven = num_items < 4 * threads && num_spans > num_items;
  const bool fits = num_spans * partial_floats(a) * int64_t(sizeof(float)) <= MAX_PARTIAL_BYTES;
  const bool done = threads > 1 && is_uneven && fits ? attend_by_spans<T, C>(a, items, num_items, threads)
                                                     : attend_by_items<T, C>(a, items, num_items, threads);
  __builtin_free(items);
  return done;
}

template <class T>
static bool attend_stored(const AttentionArgs& a) {
  switch (a.stored) {
    case Stored::int8: return attend<T, int8>(a);
    case Stored::e4m3: return attend<T, e4m3>(a);
    case Stored::e5m2: return attend<T, e5m2>(a);
    default: return attend<T, T>(a);
  }
}

static bool paged_attention(const AttentionArgs& a) {
  if (a.dtype == DType::f32) return attend_stored<float>(a);
  if (a.dtype == DType::bf16) return attend_stored<bf16>(a);
  return attend_stored<f16>(a);
}
