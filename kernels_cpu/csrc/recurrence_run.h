// Convolutions and scans over sequences. Only for layers.cpp to include.
//
// Each scan is one pass in time with its state in registers and the first cache, vector lanes along channels, threads
// along sequences, heads and channels; a single step is recurrence_steps.h's, to the same bits. The chunked forms of the
// papers turn the pass into matrix products, but their sums depend on where a chunk begins; here every step of time is
// computed alone, so a token's result is bitwise the same however its prompt was cut. Holding a tile of the state in
// registers over many steps costs little more for each of its numbers and step than the products of a chunked form take.

// --- convolution -----------------------------------------------------------------------------------------------------

template <class T>
static void conv_lanes(const ConvArgs& a, int64_t first, float* taps, float* before) {
  const int64_t left = a.channels - first, kept = a.taps - 1;
  const int lanes = at_most_w(left);
  const T* weight = static_cast<const T*>(a.weight) + first * a.taps;
  T one[W] = {};
  for (int64_t j = 0; j < a.taps; ++j) {
    for (int c = 0; c < lanes; ++c) one[c] = weight[c * a.taps + j];
    store(taps + j * W, load(one));
  }
  const vf bias = a.bias ? load_up_to(static_cast<const T*>(a.bias) + first, left) : vf{};
  for (int64_t s = 0; s < a.rows.num_sequences; ++s) {
    const int64_t start = a.rows.starts[s], length = a.rows.ends[s] - start;
    const T* old = state_before(a.rows, static_cast<const T*>(a.states), s);
    if (old) old += first * kept;
    T* now = state_after(a.rows, static_cast<T*>(a.states), s) + first * kept;
    const T* x = static_cast<const T*>(a.x) + start * a.x_stride + first;
    T* out = static_cast<T*>(a.out) + start * a.channels + first;
    for (int64_t j = 0; j < kept; ++j) {
      for (int c = 0; c < lanes; ++c) one[c] = old ? old[c * kept + j] : T();
      store(before + j * W, load(one));
    }
    for (int64_t t = 0; t < length; ++t) {
      vf sum = bias;
      for (int64_t j = 0; j < a.taps; ++j) {
        const int64_t from = t - kept + j;
        const vf input = from < 0 ? load(before + (from + kept) * W) : load_up_to(x + from * a.x_stride, left);
        sum += input * load(taps + j * W);
      }
      store_up_to(out + t * a.channels, a.has_silu ? activate<Gate::silu>(sum) : sum, left);
    }
    for (int64_t j = 0; j < kept; ++j) {  // the last inputs; older ones move down where few are new
      const int64_t from = length - kept + j;
      for (int c = 0; c < lanes; ++c)
        now[c * kept + j] = from >= 0 ? x[from * a.x_stride + c] : old ? old[c * kept + kept + from] : T();
    }
  }
}

template <class T>
static bool conv_of(const ConvArgs& a) {
  const int64_t units = (a.channels + W - 1) / W;
  const int threads = threads_of(units, extent_of(a.rows).count * a.channels * (a.taps + 4) * 4);
  return in_two_phases(
      a.team, threads, 0, [](int64_t) {}, units, (units + threads - 1) / threads, 2 * a.taps * W,
      [&](int64_t unit, float* memory) { conv_lanes<T>(a, unit * W, memory, memory + a.taps * W); });
}

static bool conv(const ConvArgs& a) {
  if (a.dtype == DType::f32) return conv_of<float>(a);
  if (a.dtype == DType::bf16) return conv_of<bf16>(a);
  return conv_of<f16>(a);
}

// --- transposed copies of a state ------------------------------------------------------------------------------------

// to[n][lane] = from[lane][n] for `lanes` rows of `size` numbers at `stride`; other lanes, and all for null, are zero.
static void take_lanes(const float* from, int64_t stride, int64_t size, int lanes, float* to) {
  int64_t n = 0;
  if (!from) lanes = 0;
  if (lanes == W)
    for (; n + W <= size; n += W) {
      vf square[W];
      for (int i = 0; i < W; ++i) square[i] = load(from + i * stride + n);
      transpose(square);
      for (int i = 0; i < W; ++i) store(to + (n + i) * W, square[i]);
    }
  for (; n < size; ++n)
    for (int i = 0; i < W; ++i) to[n * W + i] = i < lanes ? from[i * stride + n] : 0.0f;
}

static void give_lanes(const float* from, int64_t stride, int64_t size, int lanes, float* to) {
  int64_t n = 0;
  if (lanes == W)
    for (; n + W <= size; n += W) {
      vf square[W];
      for (int i = 0; i < W; ++i) square[i] = load(from + (n + i) * W);
      transpose(square);
      for (int i = 0; i < W; ++i) store(to + i * stride + n, square[i]);
    }
  for (; n < size; ++n)
    for (int i = 0; i < lanes; ++i) to[i * stride + n] = from[n * W + i];
}

// --- Mamba -----------------------------------------------------------------------------------------------------------

template <class T>
static void selective_lanes(const SelectiveArgs& a, int64_t first, const float* b, const float* c, int64_t first_row,
                            int64_t padded, float* memory) {
  const int64_t left = a.channels - first;
  const int lanes = at_most_w(left);
  float *rates = memory, *h = memory + padded * W;
  take_lanes(a.a + first * a.size, a.size, a.size, lanes, rates);
  for (int64_t i = a.size * W; i < padded * W; i += W) store(rates + i, vf{});
  const vf d = a.d ? load_up_to(a.d + first, left) : vf{};
  for (int64_t s = 0; s < a.rows.num_sequences; ++s) {
    if (lanes == W && a.size % W == 0 && is_step(a.rows, s)) {
      selective_step<T>(a, s, first, b, c, first_row, padded);
      continue;
    }
    const float* old = state_before(a.rows, static_cast<const float*>(a.states), s);
    take_lanes(old ? old + first * a.size : nullptr, a.size, a.size, lanes, h);
    for (int64_t i = a.size * W; i < padded * W; i += W) store(h + i, vf{});
    for (int64_t t = a.rows.starts[s]; t < a.rows.ends[s]; ++t) {
      const vf x = load_up_to(static_cast<const T*>(a.x) + t * a.x_stride + first, left);
      const vf dt = load_up_to(a.dt + t * a.dt_stride + first, left);
      const vf added = dt * x;
      vf sum{};
      const float *adds = b + (t - first_row) * padded, *asks = c + (t - first_row) * padded;
      for (int64_t begin = 0; begin < padded; begin += W) {
        vf next[W];
#pragma GCC unroll 16
        for (int n = 0; n < W; ++n) {
          float* number = h + (begin + n) * W;
          next[n] = fma_of(exp_of(dt * load(rates + (begin + n) * W)), load(number), added * splat(adds[begin + n]));
          store(number, next[n]);
        }
        sum = sum + asked_of_lanes(next, asks + begin);
      }
      store_up_to(static_cast<T*>(a.out) + t * a.channels + first, fma_of(d, x, sum), left);
    }
    give_lanes(h, a.size, a.size, lanes, state_after(a.rows, a.states, s) + first * a.size);
  }
}

template <class T>
static bool selective_of(const SelectiveArgs& a) {
  const auto [first_row, tokens] = extent_of(a.rows);
  const int64_t padded = round_up(a.size, W), units = (a.channels + W - 1) / W;
  const int threads = threads_of(units, tokens * a.channels * a.size * 8);
  float* b = static_cast<float*>(__builtin_malloc(size_t(2 * tokens * padded) * sizeof(float)));
  if (!b) return false;
  float* c = b + tokens * padded;
  const auto widen = [&](int64_t t) {
    widen_operand(a.b, first_row + t, 1, a.size, padded, b + t * padded);
    widen_operand(a.c, first_row + t, 1, a.size, padded, c + t * padded);
  };
  const bool has_memory = in_two_phases(
      a.team, threads, tokens, widen, units, (units + threads - 1) / threads, 2 * padded * W,
      [&](int64_t unit, float* memory) { selective_lanes<T>(a, unit * W, b, c, first_row, padded, memory); });
  __builtin_free(b);
  return has_memory;
}

static bool selective_scan(const SelectiveArgs& a) {
  if (a.dtype == DType::f32) return selective_of<float>(a);
  if (a.dtype == DType::bf16) return selective_of<bf16>(a);
  return selective_of<f16>(a);
}

// --- Mamba-2 ---------------------------------------------------------------------------------------------------------

constexpr int64_t TIMES = 32;  // steps for which W numbers of each lane's state stay in registers

// Steps [0, times) of W numbers of each lane's state: h is read and written, sums[t] is added to.
static inline void hold_state(float* h, const float* b, const float* c, int64_t step, const float* decay,
                              const float* added, float* sums, int64_t times) {
  vf held[W];
#pragma GCC unroll 16
  for (int n = 0; n < W; ++n) held[n] = load(h + n * W);
  for (int64_t t = 0; t < times; ++t, b += step, c += step) {
    const vf keep = splat(decay[t]), add = load(added + t * W);
#pragma GCC unroll 16
    for (int n = 0; n < W; ++n) held[n] = fma_of(keep, held[n], add * splat(b[n]));
    store(sums + t * W, load(sums + t * W) + asked_of_lanes(held, c));
  }
#pragma GCC unroll 16
  for (int n = 0; n < W; ++n) store(h + n * W, held[n]);
}

static void decays_of(const SsdArgs& a, int64_t head, int64_t begin, int64_t times, float* decay) {
  float scaled[TIMES + W] = {};
  for (int64_t t = 0; t < times; ++t) scaled[t] = a.dt[(begin + t) * a.dt_stride + head] * a.a[head];
  for (int64_t t = 0; t < times; t += W) store(decay + t, exp_of(load(scaled + t)));
}

template <class T>
static void ssd_unit(const SsdArgs& a, int64_t sequence, int64_t head, int64_t first, const float* b, const float* c,
                     int64_t first_row, int64_t padded, float* memory) {
  if (a.channels - first >= W && a.size % W == 0 && is_step(a.rows, sequence))
    return ssd_step<T>(a, sequence, head, first, b, c, first_row, padded);
  const int64_t left = a.channels - first, group = head / (a.heads / a.groups);
  const int lanes = at_most_w(left);
  float *h = memory, *added = h + padded * W, *sums = added + TIMES * W, *decay = sums + TIMES * W;
  const int64_t at = (head * a.channels + first) * a.size;
  const float* old = state_before(a.rows, static_cast<const float*>(a.states), sequence);
  take_lanes(old ? old + at : nullptr, a.size, a.size, lanes, h);
  for (int64_t i = a.size * W; i < padded * W; i += W) store(h + i, vf{});
  const vf d = splat(a.d ? a.d[head] : 0.0f);
  const int64_t end = a.rows.ends[sequence];
  for (int64_t begin = a.rows.starts[sequence]; begin < end; begin += TIMES) {
    const int64_t times = end - begin < TIMES ? end - begin : TIMES;
    decays_of(a, head, begin, times, decay);
    for (int64_t t = 0; t < times; ++t) {
      const T* row = static_cast<const T*>(a.x) + (begin + t) * a.x_stride + head * a.channels + first;
      const vf x = load_up_to(row, left);
      store(added + t * W, x * splat(a.dt[(begin + t) * a.dt_stride + head]));
      store(sums + t * W, vf{});
    }
    for (int64_t n = 0; n < padded; n += W) {
      const int64_t operand = ((begin - first_row) * a.groups + group) * padded + n;
      hold_state(h + n * W, b + operand, c + operand, a.groups * padded, decay, added, sums, times);
    }
    for (int64_t t = 0; t < times; ++t) {
      const int64_t row = begin + t, offset = head * a.channels + first;
      const vf x = load_up_to(static_cast<const T*>(a.x) + row * a.x_stride + offset, left);
      store_up_to(static_cast<T*>(a.out) + row * a.heads * a.channels + offset, fma_of(d, x, load(sums + t * W)), left);
    }
  }
  give_lanes(h, a.size, a.size, lanes, state_after(a.rows, a.states, sequence) + at);
}

template <class T>
static bool ssd_of(const SsdArgs& a) {
  const auto [first_row, tokens] = extent_of(a.rows);
  const int64_t padded = round_up(a.size, W);
  const int64_t blocks = (a.channels + W - 1) / W, units = a.rows.num_sequences * a.heads * blocks;
  const int threads = threads_of(units, tokens * a.heads * a.channels * a.size);
  const int64_t grain = grain_of(a.rows, units, threads);
  const int64_t width = a.groups * padded;
  float* b = static_cast<float*>(__builtin_malloc(size_t(2 * tokens * width) * sizeof(float)));
  if (!b) return false;
  float* c = b + tokens * width;
  const auto widen = [&](int64_t t) {
    widen_operand(a.b, first_row + t, a.groups, a.size, padded, b + t * width);
    widen_operand(a.c, first_row + t, a.groups, a.size, padded, c + t * width);
  };
  const auto scan = [&](int64_t unit, float* memory) {
    const int64_t part = unit / blocks;
    ssd_unit<T>(a, part / a.heads, part % a.heads, unit % blocks * W, b, c, first_row, padded, memory);
  };
  const int64_t floats = padded * W + 2 * TIMES * W + TIMES + W;
  const bool has_memory = in_two_phases(a.team, threads, tokens, widen, units, grain, floats, scan);
  __builtin_free(b);
  return has_memory;
}

static bool ssd_scan(const SsdArgs& a) {
  if (a.dtype == DType::f32) return ssd_of<float>(a);
  if (a.dtype == DType::bf16) return ssd_of<bf16>(a);
  return ssd_of<f16>(a);
}

// --- the gated delta rule --------------------------------------------------------------------------------------------

// VECS vectors of values of one head: h [D, VECS * W] stays in the first cache. With h' = keep * h, what is recalled is
// h'^T k = keep * (h^T k), and h_new^T q = keep * (h^T q) + (k . q) * change: two passes over h are enough for a step.
template <class T, int VECS>
static void delta_unit(const DeltaArgs& a, int64_t sequence, int64_t head, int64_t first, const float* q, const float* k,
                       const float* dots, int64_t first_row, int64_t padded, float* h) {
  if (a.v_size - first >= VECS * W && is_step(a.rows, sequence))
    return delta_step<T, VECS>(a, sequence, head, first, q, k, dots, first_row, padded);
  const int64_t group = head / (a.heads / a.groups);
  const int64_t offset = head * a.size * a.v_size + first;
  const float* old = state_before(a.rows, static_cast<const float*>(a.states), sequence);
  for (int64_t i = 0; i < a.size; ++i)
    for (int v = 0; v < VECS; ++v) {
      const int64_t left = a.v_size - first - v * W;
      const bool has_old = old && left > 0;
      store(h + (i * VECS + v) * W, has_old ? load_up_to(old + offset + i * a.v_size + v * W, left) : vf{});
    }
  for (int64_t t = a.rows.starts[sequence]; t < a.rows.ends[sequence]; ++t) {
    const int64_t row = (t - first_row) * a.groups + group;
    const float *key = k + row * padded, *query = q + row * padded;
    const vf keep = splat(exp_of(splat(a.decay[t * a.decay_stride + head]))[0]);
    const vf rate = splat(a.beta[t * a.beta_stride + head]), dot = splat(dots[row]);
    vf recalled[2][VECS] = {}, asked[2][VECS] = {};
    for (int64_t i = 0; i < padded; i += 2)  // h and keys are padded by zeros to an even number
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < VECS; ++v) {
          const vf value = load(h + ((i + j) * VECS + v) * W);
          recalled[j][v] = fma_of(value, splat(key[i + j]), recalled[j][v]);
          asked[j][v] = fma_of(value, splat(query[i + j]), asked[j][v]);
        }
    vf change[VECS];
    for (int v = 0; v < VECS; ++v) {
      const int64_t left = a.v_size - first - v * W;
      if (left <= 0) {
        change[v] = vf{};
        continue;
      }
      const T* value = static_cast<const T*>(a.v) + t * a.v_stride + head * a.v_size + first + v * W;
      change[v] = change_of(load_up_to(value, left), rate, keep, recalled[0][v] + recalled[1][v]);
      T* out = static_cast<T*>(a.out) + (t * a.heads + head) * a.v_size + first + v * W;
      store_up_to(out, fma_of(dot, change[v], keep * (asked[0][v] + asked[1][v])), left);
    }
    for (int64_t i = 0; i < a.size; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) {
        float* at = h + (i * VECS + v) * W;
        store(at, fma_of(splat(key[i]), change[v], keep * load(at)));
      }
  }
  float* state = state_after(a.rows, a.states, sequence) + offset;
  for (int64_t i = 0; i < a.size; ++i)
    for (int v = 0; v < VECS; ++v) {
      const int64_t left = a.v_size - first - v * W;
      if (left > 0) store_up_to(state + i * a.v_size + v * W, load(h + (i * VECS + v) * W), left);
    }
}

static inline float dot_of(const float* a, const float* b, int64_t n) {
  vf sum{};
  for (int64_t i = 0; i < n; i += W) sum += load(a + i) * load(b + i);
  return sum_of(sum);
}

template <class T>
static bool delta_of(const DeltaArgs& a) {
  constexpr int VECS = W == 16 ? 2 : 4;
  const auto [first_row, tokens] = extent_of(a.rows);
  const int64_t padded = round_up(a.size, W), width = a.groups * padded;
  const int64_t blocks = (a.v_size + VECS * W - 1) / (VECS * W), units = a.rows.num_sequences * a.heads * blocks;
  const int threads = threads_of(units, tokens * a.heads * a.v_size * a.size * 2);
  const int64_t grain = grain_of(a.rows, units, threads);
  float* q = static_cast<float*>(__builtin_malloc(size_t(tokens * (2 * width + a.groups)) * sizeof(float)));
  if (!q) return false;
  float *k = q + tokens * width, *dots = k + tokens * width;
  const auto widen = [&](int64_t t) {
    widen_operand(a.q, first_row + t, a.groups, a.size, padded, q + t * width);
    widen_operand(a.k, first_row + t, a.groups, a.size, padded, k + t * width);
    for (int64_t g = 0; g < a.groups; ++g)
      dots[t * a.groups + g] = dot_of(q + t * width + g * padded, k + t * width + g * padded, padded);
  };
  const auto recall = [&](int64_t unit, float* h) {
    const int64_t part = unit / blocks;
    delta_unit<T, VECS>(a, part / a.heads, part % a.heads, unit % blocks * VECS * W, q, k, dots, first_row, padded, h);
  };
  const bool has_memory = in_two_phases(a.team, threads, tokens, widen, units, grain, padded * VECS * W, recall);
  __builtin_free(q);
  return has_memory;
}

static bool delta_rule(const DeltaArgs& a) {
  if (a.dtype == DType::f32) return delta_of<float>(a);
  if (a.dtype == DType::bf16) return delta_of<bf16>(a);
  return delta_of<f16>(a);
}
