// Mixtures of experts. Only for layers.cpp to include.
//
// Pairs of token and expert are sorted by expert and taken WAVE at a time: gathered, multiplied by gate and up,
// activated, multiplied by down, all panels of all experts of a wave shared among threads. A token adds up its experts
// in the order of their ids, whatever the waves, so its result does not depend on the others. Weights are floats, or codes
// whose inputs are rounded or not, as in a linear layer.

constexpr int64_t WAVE = 1024;            // pairs at a time: bounds the memory of a long prompt
constexpr int64_t SHARE = TILE_ROWS * 32;  // pairs of one expert that meet a panel together

static inline int threads_of(int64_t units, int64_t work) {
#if defined(_OPENMP)
  const int64_t useful = work / (1 << 17) + 1;  // a thread should have some microseconds to do
  int64_t threads = omp_get_max_threads();
  if (threads > units) threads = units;
  if (threads > useful) threads = useful;
  return int(threads < 1 ? 1 : threads);
#else
  (void)units, (void)work;
  return 1;
#endif
}

// `work(i)` for all of `count`, by all threads if `is_much`.
template <class Work>
static void by_parts(Team* team, bool is_much, int64_t count, const Work& work) {
  if (!team) {
#pragma omp parallel for schedule(static) if (is_much)
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  const int sharing = is_much ? team->threads : 1;
  auto job = [&](int thread) {
    for (int64_t i = share_of(count, sharing, thread); i < share_of(count, sharing, thread + 1); ++i) work(i);
  };
  spread(team, sharing, job);
}

struct Piece {  // pairs [first, end) of one expert
  int64_t expert, first, end;
};

struct Sorted {
  int64_t* token;   // [n]: of each pair, in the order of experts
  float* share;     // [n]
  int64_t* places;  // [T, k]: where a token's pairs are, ascending
  int64_t* cursor;  // [T]: how many of them are added already
  int64_t* first;   // [E + 1]
  void* block;
};

static bool sort_pairs(const ExpertArgs& a, Sorted& s) {
  const int64_t n = a.tokens * a.num_chosen;
  const size_t count = size_t(2 * n + a.tokens + a.num_experts + 1);
  s.block = __builtin_malloc(count * sizeof(int64_t) + size_t(n) * sizeof(float));
  if (!s.block) return false;
  s.token = static_cast<int64_t*>(s.block);
  s.places = s.token + n, s.cursor = s.places + n, s.first = s.cursor + a.tokens;
  s.share = reinterpret_cast<float*>(s.first + a.num_experts + 1);
  for (int64_t e = 0; e <= a.num_experts; ++e) s.first[e] = 0;
  for (int64_t i = 0; i < n; ++i) ++s.first[a.chosen[i] + 1];
  for (int64_t e = 0; e < a.num_experts; ++e) s.first[e + 1] += s.first[e];
  for (int64_t t = 0; t < a.tokens; ++t) {
    s.cursor[t] = 0;
    for (int64_t j = 0; j < a.num_chosen; ++j) {
      const int64_t place = s.first[a.chosen[t * a.num_chosen + j]]++;
      s.token[place] = t, s.share[place] = a.shares[t * a.num_chosen + j];
      int64_t* places = s.places + t * a.num_chosen;
      int64_t at = j;
      for (; at > 0 && places[at - 1] > place; --at) places[at] = places[at - 1];
      places[at] = place;
    }
  }
  for (int64_t e = a.num_experts; e > 0; --e) s.first[e] = s.first[e - 1];
  s.first[0] = 0;
  return true;
}

// The pieces of the pairs [begin, end), or only their number where `pieces` is null.
static int64_t list_pieces(const ExpertArgs& a, const Sorted& s, int64_t begin, int64_t end, Piece* pieces) {
  int64_t count = 0;
  for (int64_t e = 0; e < a.num_experts; ++e) {
    int64_t first = s.first[e] > begin ? s.first[e] : begin;
    const int64_t last = s.first[e + 1] < end ? s.first[e + 1] : end;
    for (; first < last; first += SHARE, ++count)
      if (pieces) pieces[count] = {e, first, first + SHARE < last ? first + SHARE : last};
  }
  return count;
}

static inline vf gate_of(const ExpertArgs& a, vf gate, vf up) {
  switch (a.gate) {
    case ExpertGate::silu: return activate<Gate::silu>(gate) * up;
    case ExpertGate::gelu_tanh: return activate<Gate::gelu_tanh>(gate) * up;
    case ExpertGate::gelu: return activate<Gate::gelu>(gate) * up;
    default: break;
  }
  const vf limit = splat(a.limit);
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up;
  up = up < -limit ? -limit : up;
  return gate * sigmoid_of(splat(a.alpha) * gate) * (up + splat(1.0f));
}

// What the tiles read of an input: float32, pairs of bfloat16 where the unit multiplies them, or words of rounded inputs.
enum class Fed { wide, pairs, words };

// Values are rounded to T.
template <class T, bool IS_PAIRS>
static inline void put(uint32_t* row, int64_t i, vf x, int n) {
  T rounded[W];
  store(rounded, x);
  if constexpr (IS_PAIRS) {
    __builtin_memcpy(reinterpret_cast<char*>(row) + i * 2, rounded, size_t(n) * 2);
  } else {
    float wide[W];
    store(wide, load(rounded));
    __builtin_memcpy(row + i, wide, size_t(n) * 4);
  }
}

// The inputs of one layer of all experts: pair p of a wave lies at row p.
struct Inputs {
  uint32_t* rows;
  int64_t stride, padded;  // in words of 32 bits; inputs with the zeros after them
  float* scales;           // [pairs, groups of the scales]
  int32_t* totals;         // [pairs, groups]
  int64_t groups_of_scales;
  const LinearWeights* weights;  // of one expert: all have the same sizes
};

template <class T>
static inline vf load_up_to(const T* p, int64_t left) {
  return left >= W ? load(p) : load_part(p, int(left));
}

template <class T>
static inline void store_up_to(T* p, vf x, int64_t left) {
  if (left >= W) store(p, x);
  else store_part(p, x, int(left));
}

static inline int at_most_w(int64_t left) { return left < W ? int(left) : W; }

// Writes `value(i)`, W of them at a time, as the inputs of one pair. `wide` [padded] is scratch.
template <class T, Fed KIND, class Value>
static inline void feed(const Inputs& to, int64_t pair, float* wide, const Value& value) {
  constexpr bool IS_PAIRS = KIND == Fed::pairs;
  const int64_t width = to.weights->num_inputs;
  uint32_t* row = to.rows + pair * to.stride;
  uint32_t* target = KIND == Fed::words ? reinterpret_cast<uint32_t*>(wide) : row;
  for (int64_t i = 0; i < width; i += W) put<T, IS_PAIRS>(target, i, value(i), at_most_w(width - i));
  constexpr int64_t SIZE = IS_PAIRS ? 2 : 4;
  __builtin_memset(reinterpret_cast<char*>(target) + width * SIZE, 0, size_t((to.padded - width) * SIZE));
  if constexpr (KIND == Fed::words)
    round_row(*to.weights, wide, row, to.scales + pair * to.groups_of_scales, to.totals + pair * to.weights->num_groups);
}

template <class T, Fed KIND>
static void gather_pair(const ExpertArgs& a, const Sorted& s, int64_t pair, const Inputs& to, int64_t place, float* wide) {
  const int64_t width = a.down->num_outputs;
  const T* x = static_cast<const T*>(a.x) + s.token[pair] * a.x_stride;
  const vf factor = splat(a.weighs_input ? s.share[pair] : 1.0f);
  feed<T, KIND>(to, place, wide, [&](int64_t i) { return load_up_to(x + i, width - i) * factor; });
}

template <class T, Fed KIND>
static void activate_pair(const ExpertArgs& a, const float* both, const Inputs& to, int64_t place, float* wide) {
  const int64_t width = a.down->num_inputs;
  feed<T, KIND>(to, place, wide, [&](int64_t i) {
    return gate_of(a, load_up_to(both + i, width - i), load_up_to(both + width + i, width - i));
  });
}

// Adds the pairs of a wave that ends at `end` to one token's sum.
static void add_pairs(const ExpertArgs& a, const Sorted& s, int64_t token, int64_t begin, int64_t end,
                      const float* results, float* sum) {
  const int64_t width = a.down->num_outputs;
  const int64_t* places = s.places + token * a.num_chosen;
  int64_t& cursor = s.cursor[token];
  for (; cursor < a.num_chosen && places[cursor] < end; ++cursor) {
    const float* result = results + (places[cursor] - begin) * width;
    const vf share = splat(a.weighs_input ? 1.0f : s.share[places[cursor]]);
    for (int64_t i = 0; i < width; i += W) {
      const int64_t left = width - i;
      store_up_to(sum + i, load_up_to(sum + i, left) + share * load_up_to(result + i, left), left);
    }
  }
}

// What a wave works in. Pair p of it lies at p - begin.
struct Wave {
  int64_t begin, end;
  const Piece* pieces;
  int64_t num_pieces;
  Inputs x, inner;
  float *both, *results, *sums;
  float* wide;  // [threads, wide_size]: scratch of rounding
  int64_t wide_size;
};

// One layer of all experts: its inputs times the weights give `to` in float32.
template <class Kind>
static void multiply_piece(const Wave& w, const LinearWeights* experts, const Inputs& from, float* to, int64_t unit) {
  const int64_t panels = (experts->num_outputs + PANEL - 1) / PANEL;
  const Piece& piece = w.pieces[unit / panels];
  const LinearWeights& weights = experts[piece.expert];
  const LinearArgs product{&weights, DType::f32, nullptr, to, 0, 0, weights.num_outputs};
  const Prepared prepared{from.rows, from.stride, from.scales, from.totals, from.groups_of_scales};
  panel_of_chunk<Kind, float>(product, prepared, piece.first - w.begin, piece.end - w.begin, unit % panels);
}

// `work(i, thread)` for every i of `count`, whoever is free, by the team whose leader calls.
template <class Work>
static void share_out(Team* team, int threads, int64_t count, const Work& work) {
  int64_t next = 0;
  auto job = [&](int thread) {
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) work(i, thread);
  };
  spread(team, threads, job);
}

template <class UpKind, class DownKind, class T, Fed KIND>
static void run_wave(const ExpertArgs& a, const Sorted& s, const Wave& w, int threads) {
  const int64_t units_up = w.num_pieces * ((a.gate_up->num_outputs + PANEL - 1) / PANEL);
  const int64_t units_down = w.num_pieces * ((a.down->num_outputs + PANEL - 1) / PANEL);
  const auto gather = [&](int64_t p, int thread) {
    gather_pair<T, KIND>(a, s, w.begin + p, w.x, p, w.wide + thread * w.wide_size);
  };
  const auto up = [&](int64_t unit, int) { multiply_piece<UpKind>(w, a.gate_up, w.x, w.both, unit); };
  const auto activate = [&](int64_t p, int thread) {
    activate_pair<T, KIND>(a, w.both + p * a.gate_up->num_outputs, w.inner, p, w.wide + thread * w.wide_size);
  };
  const auto down = [&](int64_t unit, int) { multiply_piece<DownKind>(w, a.down, w.inner, w.results, unit); };
  const auto sum = [&](int64_t t, int) {
    add_pairs(a, s, t, w.begin, w.end, w.results, w.sums + t * a.down->num_outputs);
  };
  const int64_t pairs = w.end - w.begin;
  if (a.team) {
    share_out(a.team, threads, pairs, gather);
    share_out(a.team, threads, units_up, up);
    share_out(a.team, threads, pairs, activate);
    share_out(a.team, threads, units_down, down);
    for (int64_t t = 0; t < a.tokens; ++t) sum(t, 0);
    return;
  }
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int thread = current_thread();
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pairs; ++p) gather(p, thread);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units_up; ++unit) up(unit, thread);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pairs; ++p) activate(p, thread);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units_down; ++unit) down(unit, thread);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.tokens; ++t) sum(t, thread);
  }
}

template <class T>
static void write_sums(const ExpertArgs& a, const float* sums) {
  const int64_t width = a.down->num_outputs;
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t i = 0; i < width; i += W) {
      T* out = static_cast<T*>(a.out) + t * a.out_stride + i;
      store_up_to(out, load_up_to(sums + t * width + i, width - i), width - i);
    }
}

template <Fed KIND>
static Inputs inputs_for(const LinearWeights& w) {
  Inputs inputs{};
  inputs.weights = &w;
  inputs.padded = w.num_slots * inputs_of(w.format);
  inputs.stride = KIND == Fed::words ? inputs.padded / 4 * Dots::WORDS : KIND == Fed::pairs ? inputs.padded / 2 : inputs.padded;
  inputs.groups_of_scales = w.rounding == Rounding::by_group ? w.num_groups : 1;
  return inputs;
}

// Hands out parts of a block from `next` on, each 64 bytes aligned. Begun at 0 it only counts.
struct Cursor {
  uintptr_t next;

  template <class V>
  V* take(int64_t count) {
    V* taken = reinterpret_cast<V*>(next);
    next += (size_t(count) * sizeof(V) + 63) & ~size_t(63);
    return taken;
  }
};

template <Fed KIND>
static void place(Inputs& inputs, int64_t pairs, Cursor& block) {
  inputs.rows = block.take<uint32_t>(pairs * inputs.stride);
  if constexpr (KIND == Fed::words) {
    inputs.scales = block.take<float>(pairs * inputs.groups_of_scales);
    inputs.totals = block.take<int32_t>(pairs * inputs.weights->num_groups);
  }
}

// Where everything of a wave of `most` pairs lies.
template <Fed KIND>
static void place(const ExpertArgs& a, Wave& w, int64_t most, int threads, Cursor& block) {
  const int64_t width = a.down->num_outputs;
  w.wide_size = KIND == Fed::words ? (w.x.padded > w.inner.padded ? w.x.padded : w.inner.padded) : 0;
  w.both = block.take<float>(most * a.gate_up->num_outputs);
  w.results = block.take<float>(most * width);
  w.sums = block.take<float>(a.tokens * width);
  w.wide = block.take<float>(threads * w.wide_size);
  place<KIND>(w.x, most, block);
  place<KIND>(w.inner, most, block);
}

template <class UpKind, class DownKind, class T, Fed KIND>
static bool run_experts(const ExpertArgs& a) {
  Sorted s;
  if (!sort_pairs(a, s)) return false;
  const int64_t n = a.tokens * a.num_chosen, most = n < WAVE ? n : WAVE;
  const int64_t panels = (a.gate_up->num_outputs + PANEL - 1) / PANEL;
  const int most_threads = a.team ? a.team->threads : threads_of(INT32_MAX, INT64_MAX / 2);
  Wave w{};
  w.x = inputs_for<KIND>(*a.gate_up), w.inner = inputs_for<KIND>(*a.down);
  const int64_t most_pieces = a.num_experts + most / SHARE + 1;
  Cursor counted{0};
  counted.take<Piece>(most_pieces);
  place<KIND>(a, w, most, most_threads, counted);
  void* memory = __builtin_malloc(counted.next + 64);
  if (memory) {
    Cursor block{(reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63)};
    Piece* pieces = block.take<Piece>(most_pieces);
    w.pieces = pieces;
    place<KIND>(a, w, most, most_threads, block);
    __builtin_memset(w.sums, 0, size_t(a.tokens * a.down->num_outputs) * sizeof(float));
    for (w.begin = 0; w.begin < n; w.begin = w.end) {
      w.end = w.begin + WAVE < n ? w.begin + WAVE : n;
      w.num_pieces = list_pieces(a, s, w.begin, w.end, pieces);
      const int64_t work = (w.end - w.begin) * a.gate_up->num_outputs * a.gate_up->num_inputs;
      const int threads = threads_of(w.num_pieces * panels, work);
      run_wave<UpKind, DownKind, T, KIND>(a, s, w, a.team && threads > 1 ? a.team->threads : threads);
    }
    write_sums<T>(a, w.sums);
    __builtin_free(memory);
  }
  __builtin_free(s.block);
  return memory != nullptr;
}

// Both layers of codes of one size, or of two.
template <class T, Fed KIND, template <Format> class Kind>
static bool run_codes(const ExpertArgs& a) {
  const bool up = a.gate_up->format == Format::u4, down = a.down->format == Format::u4;
  if (up && down) return run_experts<Kind<Format::u4>, Kind<Format::u4>, T, KIND>(a);
  if (up) return run_experts<Kind<Format::u4>, Kind<Format::u8>, T, KIND>(a);
  if (down) return run_experts<Kind<Format::u8>, Kind<Format::u4>, T, KIND>(a);
  return run_experts<Kind<Format::u8>, Kind<Format::u8>, T, KIND>(a);
}

template <class T, Format F>
static bool experts_of(const ExpertArgs& a) {
  if (a.gate_up->format == Format::u4 || a.gate_up->format == Format::u8) {
    if (a.gate_up->rounding != Rounding::none) return run_codes<T, Fed::words, Codes>(a);
    return run_codes<T, Fed::wide, Widened>(a);
  }
#if defined(__AVX512BF16__)
  if constexpr (F == Format::bf16) return run_experts<Pairs, Pairs, T, Fed::pairs>(a);
#endif
  return run_experts<Widened<F>, Widened<F>, T, Fed::wide>(a);
}

static bool experts(const ExpertArgs& a) {
  if (a.tokens == 0) return true;
  if (a.dtype == DType::f32) return experts_of<float, Format::f32>(a);
  if (a.dtype == DType::bf16) return experts_of<bf16, Format::bf16>(a);
  return experts_of<f16, Format::f16>(a);
}

// --- routing ---------------------------------------------------------------------------------------------------------

static void score_experts(const RouteArgs& a, const float* logits, float* scores) {
  const int64_t n = a.num_experts;
  float most = -__builtin_inff();
  for (int64_t e = 0; e < n; ++e) most = logits[e] > most ? logits[e] : most;
  vf sum{};
  for (int64_t e = 0; e < n; e += W) {
    vf x = load_up_to(logits + e, n - e);
    vf y = a.is_sigmoid ? sigmoid_of(x) : exp_of(x - splat(most));
    store_up_to(scores + e, y, n - e);
    if (n - e >= W) sum += y;
    else sum += load_part(scores + e, int(n - e));
  }
  if (a.is_sigmoid) return;
  const float total = sum_of(sum);
  for (int64_t e = 0; e < n; ++e) scores[e] /= total;
}

// The place of the largest that is not yet taken, the lowest on a tie.
static inline int64_t largest_left(const float* values, const bool* is_taken, int64_t n) {
  int64_t best = -1;
  for (int64_t i = 0; i < n; ++i)
    if (!is_taken[i] && (best < 0 || values[i] > values[best])) best = i;
  return best;
}

static void drop_groups(const RouteArgs& a, const float* choosing, float* groups, bool* is_kept, bool* is_taken) {
  const int64_t size = a.num_experts / a.num_groups;
  for (int64_t g = 0; g < a.num_groups; ++g) {
    float first = -__builtin_inff(), second = first;
    for (int64_t e = g * size; e < (g + 1) * size; ++e)
      if (choosing[e] > first) second = first, first = choosing[e];
      else if (choosing[e] > second) second = choosing[e];
    groups[g] = a.adds_two_best ? first + second : first;
    is_kept[g] = false;
  }
  for (int64_t i = 0; i < a.num_kept_groups; ++i) is_kept[largest_left(groups, is_kept, a.num_groups)] = true;
  for (int64_t e = 0; e < a.num_experts; ++e) is_taken[e] = !is_kept[e / size];
}

static bool route(const RouteArgs& a) {
  const int64_t n = a.num_experts;
  const int threads = threads_of(a.tokens, a.tokens * n * (a.num_chosen + 8));
  bool has_memory = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : has_memory)
  {
    float* memory = static_cast<float*>(__builtin_malloc(size_t(3 * n) * sizeof(float) + size_t(2 * n)));
    has_memory = memory != nullptr;
    float *scores = memory, *choosing = memory + n, *groups = memory + 2 * n;
    bool *is_taken = reinterpret_cast<bool*>(memory + 3 * n), *is_kept = is_taken + n;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.tokens; ++t) {
      if (!memory) continue;
      const float* logits = a.logits + t * a.logits_stride;
      score_experts(a, logits, scores);
      const float* compared = a.is_by_logits ? logits : scores;
      for (int64_t e = 0; e < n; ++e) choosing[e] = compared[e] + (a.bias ? a.bias[e] : 0.0f), is_taken[e] = false;
      if (a.num_kept_groups < a.num_groups) drop_groups(a, choosing, groups, is_kept, is_taken);
      float sum = 0;
      for (int64_t j = 0; j < a.num_chosen; ++j) {
        int64_t best = largest_left(choosing, is_taken, n);
        if (best < 0) best = 0;  // NaN alone, or more experts wanted than remain
        is_taken[best] = true;
        a.ids[t * a.num_chosen + j] = best;
        sum += a.weights[t * a.num_chosen + j] = scores[best];
      }
      const float factor = a.is_renormalised ? 1.0f / (sum + 1e-20f) : 1.0f;
      for (int64_t j = 0; j < a.num_chosen; ++j) a.weights[t * a.num_chosen + j] *= factor * a.scale;
    }
    __builtin_free(memory);
  }
  return has_memory;
}
