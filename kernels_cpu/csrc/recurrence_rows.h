// What convolutions and scans read and write of their sequences. Only for layers.cpp to include.

static inline vf load_operand(const Operand& o, int64_t index, int64_t left) {
  if (o.dtype == DType::bf16) return load_up_to(static_cast<const bf16*>(o.data) + index, left);
  if (o.dtype == DType::f16) return load_up_to(static_cast<const f16*>(o.data) + index, left);
  return load_up_to(static_cast<const float*>(o.data) + index, left);
}

// A token of an operand [T, groups, size] in float32, padded by zeros: [groups, padded].
static inline void widen_operand(const Operand& o, int64_t token, int64_t groups, int64_t size, int64_t padded, float* to) {
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t i = 0; i < padded; i += W) {
      const int64_t left = size - i;
      store(to + g * padded + i, left > 0 ? load_operand(o, token * o.stride + g * size + i, left) : vf{});
    }
}

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// All rows from the first of a sequence to the last of one.
struct Extent {
  int64_t first, count;
};

static inline Extent extent_of(const Rows& rows) {
  int64_t first = 0, end = 0;
  for (int64_t s = 0; s < rows.num_sequences; ++s) {
    if (s == 0 || rows.starts[s] < first) first = rows.starts[s];
    if (rows.ends[s] > end) end = rows.ends[s];
  }
  return {first, end > first ? end - first : 0};
}

// The state before a sequence; null: zeros.
template <class T>
static inline const T* state_before(const Rows& rows, const T* states, int64_t sequence) {
  const int64_t from = rows.sources ? rows.sources[sequence] : sequence;
  return from < 0 ? nullptr : states + from * rows.state_stride;
}

template <class T>
static inline T* state_after(const Rows& rows, T* states, int64_t sequence) {
  return states + (rows.targets ? rows.targets[sequence] : sequence) * rows.state_stride;
}
