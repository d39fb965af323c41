// The paged cache as attention reads and writes it: finding rows, packing them in float32, and what eight bits mean.
// Only for attention.h to include, inside namespace QUIRE_ISA.

struct int8 {
  int8_t bits;
};
struct e4m3 {
  uint8_t bits;
};
struct e5m2 {
  uint8_t bits;
};

typedef int8_t vb8 __attribute__((vector_size(W)));
typedef int8_t vb8_mem __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint8_t vu8 __attribute__((vector_size(W)));
typedef uint8_t vu8_mem __attribute__((vector_size(W), aligned(1), may_alias));

static inline vf load(const int8* p) {
  const vb8 bits = *reinterpret_cast<const vb8_mem*>(p);
  return __builtin_convertvector(__builtin_convertvector(bits, vi), vf);
}

static inline vu load_bits(const void* p) {
  const vu8 bits = *static_cast<const vu8_mem*>(p);
  return __builtin_convertvector(bits, vu);
}

// Moving the exponent's bias by a product is right for subnormal numbers too.
static inline vf load(const e4m3* p) {
  const vu bits = load_bits(p), magnitude = bits & 0x7fu;
  const vu finite = (vu)((vf)(magnitude << 20) * splat(0x1p120f));
  const vu is_nan = (vu)(magnitude == 0x7fu);
  return (vf)(finite | (is_nan & 0x7fc00000u) | ((bits & 0x80u) << 24));
}

static inline vf load(const e5m2* p) {
  const vu bits = load_bits(p), magnitude = (bits & 0x7fu) << 21;
  const vu finite = (vu)((vf)magnitude * splat(0x1p112f));
  const vu is_special = (vu)(magnitude >= (0x7cu << 21));
  return (vf)(finite | (is_special & 0x7f800000u) | ((bits & 0x80u) << 24));
}

// Rounds to nearest, ties to even, and saturates; MANTISSA bits after the point, `tiny` the smallest normal number.
template <int MANTISSA, uint32_t BIAS>
static inline vu to_float8(vf x, float limit, float tiny, float magic) {
  constexpr int SHIFT = 23 - MANTISSA;
  const vu sign = ((vu)x >> 24) & 0x80u;
  vf size = (vf)((vu)x & 0x7fffffffu);
  const vu is_nan = (vu)(size != size);
  size = size > splat(limit) ? splat(limit) : size;
  const vu bits = (vu)size;
  const vu normal = ((bits + ((1u << (SHIFT - 1)) - 1u) + ((bits >> SHIFT) & 1u)) >> SHIFT) - (BIAS << MANTISSA);
  const vu small = (vu)(size + splat(magic)) - (vu)splat(magic);  // the adder rounds at the last subnormal place
  const vu is_small = (vu)(size < splat(tiny));
  const vu code = (is_small & small) | (~is_small & normal);
  return (is_nan & 0x7fu) | (~is_nan & code) | sign;
}

static inline void store_bits(void* p, vu bits, int n) {
  uint8_t bytes[W];
  const vu8 narrow = __builtin_convertvector(bits, vu8);
  __builtin_memcpy(bytes, &narrow, W);
  __builtin_memcpy(p, bytes, size_t(n));
}

// --- reading ---------------------------------------------------------------------------------------------------------

struct CacheOf {
  const void* data;
  const float* scales;
  int64_t block_stride, slot_stride, head_stride;
};

// The rows of a tile; null where there is none.
template <class T>
struct CacheRows {
  const T* at[keys_of<T>()];
  float scale[keys_of<T>()];  // of int8 alone
};

// Those of keys [begin, end) of the tile that starts at `tile`; nothing may be read outside.
template <class T>
static void find_rows(const AttentionArgs& a, const Item& item, const CacheOf& cache, int64_t tile, int64_t begin,
                      int64_t end, CacheRows<T>& rows) {
  const int32_t* table = a.block_table + item.request * a.table_stride;
  const T* head = static_cast<const T*>(cache.data) + item.kv_head * cache.head_stride;
  for (int i = 0; i < keys_of<T>(); ++i) rows.at[i] = nullptr;
  int64_t position = begin;
  while (position < end) {
    const int64_t offset = position % a.block_size, block = table[position / a.block_size];
    const T* row = head + block * cache.block_stride + offset * cache.slot_stride;
    const int64_t stop = position + a.block_size - offset < end ? position + a.block_size - offset : end;
    for (int64_t slot = offset; position < stop; ++position, ++slot, row += cache.slot_stride) {
      rows.at[position - tile] = row;
      if constexpr (std::is_same_v<T, int8>)
        rows.scale[position - tile] = cache.scales[(block * a.block_size + slot) * a.num_kv_heads + item.kv_head];
    }
  }
}

// Asks the memory for rows that are needed soon: blocks lie anywhere, so the processor cannot foresee them by itself.
template <class T>
static inline void prefetch_rows(const CacheRows<T>& rows, int first, int last, int64_t size) {
  constexpr int64_t LINE = 64 / int64_t(sizeof(T));
  for (int i = first; i < last; ++i)
    for (int64_t d = 0; d < size; d += LINE) __builtin_prefetch(rows.at[i] + d);
}

template <class T>
static inline vf load_row(const CacheRows<T>& rows, int i, int64_t d, int n) {
  const vf x = n == W ? load(rows.at[i] + d) : load_part(rows.at[i] + d, n);
  if constexpr (std::is_same_v<T, int8>) return x * splat(rows.scale[i]);
  return x;
}

// keys[d, i] = rows[i][d], for the groups of W keys in [first, last); zero where there is no row.
template <class T>
static void pack_keys(const CacheRows<T>& rows, int first, int last, int64_t size, float* keys) {
  for (int i = first; i < last; i += W)
    for (int64_t d = 0; d < size; d += W) {
      vf square[W];
      const int n = int(size - d < W ? size - d : W);
      for (int j = 0; j < W; ++j) square[j] = rows.at[i + j] ? load_row(rows, i + j, d, n) : vf{};
      transpose(square);
      for (int j = 0; j < W; ++j) store(keys + (d + j) * KEYS + i, square[j]);
    }
}

template <class T>
static void pack_values(const CacheRows<T>& rows, int first, int last, int64_t size, float* values) {
  const int64_t width = round_up(size, W);
  for (int i = first; i < last; ++i)
    for (int64_t d = 0; d < size; d += W)
      store(values + i * width + d, load_row(rows, i, d, int(size - d < W ? size - d : W)));
}

// --- writing ---------------------------------------------------------------------------------------------------------

// One head of one token in eight bits.
template <class T>
static void narrow_row(const T* from, int64_t size, Stored stored, void* to, float* scale) {
  float divisor = 1.0f;
  if (stored == Stored::int8) {
    vf most{};
    for (int64_t d = 0; d < size; d += W) {
      const vf x = size - d < W ? load_part(from + d, int(size - d)) : load(from + d);
      most = max((vf)((vu)x & 0x7fffffffu), most);
    }
    *scale = max_of(most) / 127.0f;
    divisor = *scale < 0x1p-126f ? 0x1p-126f : *scale;
  }
  for (int64_t d = 0; d < size; d += W) {
    const int n = int(size - d < W ? size - d : W);
    const vf x = n < W ? load_part(from + d, n) : load(from + d);
    vu bits;
    if (stored == Stored::int8) {
      const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
      vf steps = (x / splat(divisor) + magic) - magic;
      steps = steps > splat(127.0f) ? splat(127.0f) : steps < splat(-127.0f) ? splat(-127.0f) : steps;
      bits = (vu)__builtin_convertvector(steps, vi) & 0xffu;
    } else if (stored == Stored::e4m3) {
      bits = to_float8<3, 120>(x, 448.0f, 0x1p-6f, 0x1p14f);
    } else {
      bits = to_float8<2, 112>(x, 57344.0f, 0x1p-14f, 0x1p7f);
    }
    store_bits(static_cast<char*>(to) + d, bits, n);
  }
}

template <class T>
static void write_narrow(const CacheWriteArgs& a) {
#pragma omp parallel for schedule(static) if (a.num_tokens * a.num_heads * a.head_size > PARALLEL_ELEMENTS)
  for (int64_t token = 0; token < a.num_tokens; ++token) {
    const int64_t slot = a.slots[token];
    const int64_t start = slot / a.block_size * a.block_stride + slot % a.block_size * a.slot_stride;
    for (int64_t head = 0; head < a.num_heads; ++head)
      narrow_row(static_cast<const T*>(a.source) + token * a.token_stride + head * a.head_stride, a.head_size, a.stored,
                 static_cast<char*>(a.cache) + start + head * a.cache_head_stride,
                 a.scales ? a.scales + slot * a.num_heads + head : nullptr);
  }
}
