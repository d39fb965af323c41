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

// `prepare(i)` for all of `count`, then `work(unit, memory)` for all units, some at a time, with `floats` numbers of memory
// for each thread. By the team whose leader calls if there is one: then there are few rows, which the leader prepares.
template <class Prepare, class Work>
static bool in_two_phases(Team* team, int threads, int64_t count, const Prepare& prepare, int64_t units, int64_t grain,
                          int64_t floats, const Work& work) {
  if (!team) {
    bool has_memory = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : has_memory)
    {
      float* memory = static_cast<float*>(__builtin_calloc(size_t(floats), sizeof(float)));
      has_memory = memory != nullptr;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) prepare(i);
#pragma omp for schedule(dynamic, grain)
      for (int64_t unit = 0; unit < units; ++unit)
        if (memory) work(unit, memory);
      __builtin_free(memory);
    }
    return has_memory;
  }
  const int sharing = threads > 1 ? team->threads : 1;
  float* all = static_cast<float*>(__builtin_calloc(size_t(floats * sharing), sizeof(float)));
  if (!all) return false;
  for (int64_t i = 0; i < count; ++i) prepare(i);
  int64_t next = 0;
  auto job = [&](int thread) {
    for (int64_t first; (first = __atomic_fetch_add(&next, grain, __ATOMIC_RELAXED)) < units;)
      for (int64_t unit = first; unit < first + grain && unit < units; ++unit) work(unit, all + thread * floats);
  };
  spread(team, sharing, job);
  __builtin_free(all);
  return true;
}

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
