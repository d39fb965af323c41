// Masks, sampling and log-probabilities over a large vocabulary, without a sort. Only for layers.cpp to include.
//
// A first pass notes the largest logit of each BLOCK of ids. The n-th largest of these is a lower bound of the n-th
// largest logit, so the candidates for the first places lie in the few blocks that reach it; where they do not decide,
// the logits are counted into bins that keep their order, and the one bin that decides is sorted. Sums over the
// vocabulary are kept in double, in the order of ids; weights are exp((logit - largest) / temperature), not divided by
// their sum, since every rule compares them with each other.

constexpr int64_t BLOCK = 128;  // ids
constexpr int64_t BINS = 2048;
constexpr int64_t FEW = 64;     // blocks that are looked into first

typedef double vd __attribute__((vector_size(W * 8)));

struct Candidate {
  float logit;
  int32_t id;
};

// Whether a comes before b: by logit, ties by lowest id.
static inline bool is_before(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

static void sink_down(Candidate* heap, int64_t at, int64_t n) {
  const Candidate moved = heap[at];
  for (int64_t child; (child = 2 * at + 1) < n; at = child) {
    if (child + 1 < n && is_before(heap[child], heap[child + 1])) ++child;
    if (!is_before(moved, heap[child])) break;
    heap[at] = heap[child];
  }
  heap[at] = moved;
}

// Best first. A heap sort: no worst case, no recursion.
static void sort_candidates(Candidate* list, int64_t n) {
  for (int64_t i = n / 2 - 1; i >= 0; --i) sink_down(list, i, n);
  for (int64_t end = n - 1; end > 0; --end) {
    const Candidate last = list[0];
    list[0] = list[end], list[end] = last;
    sink_down(list, 0, end);
  }
}

// What is known of one row.
struct Row {
  const float* logits;
  int64_t size, num_blocks;
  float* maxima;          // [num_blocks]
  double* sums;           // [num_blocks]: of weights
  Candidate* candidates;  // [size]
  Candidate* scratch;     // [num_blocks]
  float largest;
  float temperature;
  double total;
  bool is_complete;  // whether all finite logits are candidates
};

static inline int64_t row_bytes(int64_t size) {
  const int64_t blocks = (size + BLOCK - 1) / BLOCK;
  return blocks * int64_t(sizeof(double) + sizeof(float) + sizeof(Candidate)) + size * int64_t(sizeof(Candidate)) + 64;
}

static Row row_at(const float* logits, int64_t size, char* memory) {
  Row r{};
  r.logits = logits, r.size = size, r.num_blocks = (size + BLOCK - 1) / BLOCK, r.temperature = 1.0f;
  r.sums = reinterpret_cast<double*>(memory);
  r.candidates = reinterpret_cast<Candidate*>(r.sums + r.num_blocks);
  r.scratch = r.candidates + size;
  r.maxima = reinterpret_cast<float*>(r.scratch + r.num_blocks);
  return r;
}

static inline int64_t end_of(const Row& r, int64_t block) {
  return (block + 1) * BLOCK < r.size ? (block + 1) * BLOCK : r.size;
}

static inline vf load_logits(const float* p, int64_t left) {
  if (left >= W) return load(p);
  float padded[W];
  for (int i = 0; i < W; ++i) padded[i] = i < left ? p[i] : -__builtin_inff();
  return load(padded);
}

// The maxima of the blocks and of all; false if there is a NaN.
static bool find_maxima(Row& r) {
  r.largest = -__builtin_inff();
  vi is_nan{};
  for (int64_t block = 0; block < r.num_blocks; ++block) {
    vf most = splat(-__builtin_inff());
    for (int64_t i = block * BLOCK; i < end_of(r, block); i += W) {
      const vf x = load_logits(r.logits + i, r.size - i);
      is_nan |= x != x;
      most = max(most, x);
    }
    r.maxima[block] = max_of(most);
    if (r.maxima[block] > r.largest) r.largest = r.maxima[block];
  }
  for (int i = 0; i < W; ++i)
    if (is_nan[i]) return false;
  return true;
}

// The lowest id of the largest logit; of the first NaN where there is one, as torch has it.
static int64_t find_largest(const Row& r, bool has_nan) {
  if (has_nan)
    for (int64_t i = 0; i < r.size; ++i)
      if (r.logits[i] != r.logits[i]) return i;
  for (int64_t block = 0; block < r.num_blocks; ++block)
    if (r.maxima[block] == r.largest)
      for (int64_t i = block * BLOCK; i < end_of(r, block); ++i)
        if (r.logits[i] == r.largest) return i;
  return 0;
}

// --- weights ---------------------------------------------------------------------------------------------------------

static inline vf weights_of(const Row& r, vf logits) {
  return exp_of((logits - splat(r.largest)) / splat(r.temperature));
}

static inline float weight_of(const Row& r, float logit) { return weights_of(r, splat(logit))[0]; }

static void sum_weights(Row& r) {
  r.total = 0;
  for (int64_t block = 0; block < r.num_blocks; ++block) {
    vd sum{};
    for (int64_t i = block * BLOCK; i < end_of(r, block); i += W)
      sum += __builtin_convertvector(weights_of(r, load_logits(r.logits + i, r.size - i)), vd);
    double whole = 0;
    for (int i = 0; i < W; ++i) whole += sum[i];
    r.sums[block] = whole;
    r.total += whole;
  }
}

// --- candidates ------------------------------------------------------------------------------------------------------

// All finite logits that reach the `count`-th largest maximum of a block, best first; returns how many. With fewer blocks
// than that, or where most are forbidden, these are all that are finite: then `is_complete`.
static int64_t list_candidates(Row& r, int64_t count) {
  float border = -__builtin_inff();
  if (count < r.num_blocks) {
    for (int64_t block = 0; block < count; ++block) r.scratch[block] = {r.maxima[block], int32_t(block)};
    for (int64_t i = count / 2 - 1; i >= 0; --i) sink_down(r.scratch, i, count);
    for (int64_t block = count; block < r.num_blocks; ++block)  // the worst of the best is on top
      if (r.maxima[block] > r.scratch[0].logit) {
        r.scratch[0] = {r.maxima[block], int32_t(block)};
        sink_down(r.scratch, 0, count);
      }
    border = r.scratch[0].logit;
  }
  r.is_complete = border == -__builtin_inff();
  int64_t n = 0;
  for (int64_t block = 0; block < r.num_blocks; ++block) {
    if (!(r.maxima[block] >= border)) continue;
    for (int64_t i = block * BLOCK; i < end_of(r, block); ++i)
      if (r.logits[i] >= border && r.logits[i] > -__builtin_inff()) r.candidates[n++] = {r.logits[i], int32_t(i)};
  }
  sort_candidates(r.candidates, n);
  return n;
}

// Larger logits are in lower bins; equal ones in the same.
static inline int64_t bin_of(const Row& r, float logit) {
  const float distance = (r.largest - logit) * (float(BINS) / 32.0f);
  return distance < float(BINS - 1) ? int64_t(distance) : BINS - 1;
}

// Stops at the first place, best first, where `wanted` tokens or a weight of `wanted_mass` are reached, whichever is
// asked for, and says who stands there.
static Candidate find_place(const Row& r, int64_t wanted, double wanted_mass, bool by_mass) {
  int32_t counts[BINS];
  double masses[BINS];
  for (int64_t bin = 0; bin < BINS; ++bin) counts[bin] = 0, masses[bin] = 0;
  for (int64_t i = 0; i < r.size; i += W) {
    const vf logits = load_logits(r.logits + i, r.size - i);
    const vf weights = by_mass ? weights_of(r, logits) : vf{};
    for (int j = 0; j < W && i + j < r.size; ++j) {
      const int64_t bin = bin_of(r, logits[j]);
      ++counts[bin], masses[bin] += double(weights[j]);
    }
  }
  int64_t bin = 0, count = 0;
  double mass = 0;
  for (; bin < BINS - 1; ++bin) {
    if (by_mass ? mass + masses[bin] >= wanted_mass : count + counts[bin] >= wanted) break;
    count += counts[bin], mass += masses[bin];
  }
  int64_t n = 0;
  for (int64_t i = 0; i < r.size; ++i)
    if (bin_of(r, r.logits[i]) == bin) r.candidates[n++] = {r.logits[i], int32_t(i)};
  sort_candidates(r.candidates, n);
  for (int64_t i = 0; i < n; ++i) {
    ++count;
    if (by_mass) mass += double(weight_of(r, r.candidates[i].logit));
    if (by_mass ? mass >= wanted_mass : count >= wanted) return r.candidates[i];
  }
  return {-__builtin_inff(), INT32_MAX};
}

// --- sampling --------------------------------------------------------------------------------------------------------

// The last token that is kept, in the order of logits and ids, and the smallest weight.
struct Kept {
  Candidate last;
  float min_weight;
};

// The weights of ids i to i + W, zero for those that are not kept.
static inline vf kept_weights(const Row& r, const Kept& kept, int64_t i) {
  const vf logits = load_logits(r.logits + i, r.size - i), weights = weights_of(r, logits);
  vi ids;
  for (int j = 0; j < W; ++j) ids[j] = int32_t(i) + j;
  const vf border = splat(kept.last.logit);
  const vi is_kept = ((logits > border) | ((logits == border) & (ids <= splat_int(kept.last.id)))) &
                     (weights >= splat(kept.min_weight));
  return (vf)((vi)weights & is_kept);
}

// Where top-k cuts, and the weight of what it leaves. Candidates that were overwritten are no more counted.
static Candidate cut_by_rank(Row& r, int64_t& num_candidates, int64_t top_k) {
  const bool is_listed = top_k <= num_candidates || r.is_complete;
  Candidate last{-__builtin_inff(), INT32_MAX};
  if (!is_listed) last.logit = find_place(r, top_k, 0, false).logit;
  else if (top_k <= num_candidates) last.logit = r.candidates[top_k - 1].logit;
  r.total = 0;  // all that tie with the last are kept
  if (is_listed) {
    for (int64_t i = 0; i < num_candidates && r.candidates[i].logit >= last.logit; ++i)
      r.total += double(weight_of(r, r.candidates[i].logit));
  } else {
    num_candidates = 0;
    for (int64_t i = 0; i < r.size; i += W) {
      const vf weights = kept_weights(r, {last, 0.0f}, i);
      for (int j = 0; j < W; ++j) r.total += double(weights[j]);
    }
  }
  return last;
}

// What top-k and top-p leave; `num_candidates` of the best are listed.
static Kept filter(Row& r, int64_t num_candidates, int64_t top_k, float top_p, float min_p) {
  Kept kept{{-__builtin_inff(), INT32_MAX}, min_p};
  if (top_k < r.size) kept.last = cut_by_rank(r, num_candidates, top_k < 1 ? 1 : top_k);
  if (top_p >= 1) return kept;
  const double wanted = double(top_p) * r.total;
  double reached = 0;
  for (int64_t i = 0; i < num_candidates; ++i) {
    reached += double(weight_of(r, r.candidates[i].logit));
    if (reached < wanted) continue;
    if (is_before(r.candidates[i], kept.last)) kept.last = r.candidates[i];
    return kept;
  }
  if (r.is_complete && num_candidates) return kept;  // but for rounding all were needed
  const Candidate place = find_place(r, 0, wanted, true);
  if (is_before(place, kept.last)) kept.last = place;
  return kept;
}

// The first id whose running sum of kept weights exceeds uniform times their sum.
static int64_t draw_kept(Row& r, const Kept& kept, double uniform, bool has_sums) {
  if (!has_sums) r.total = 0;
  for (int64_t block = 0; block < r.num_blocks && !has_sums; ++block) {
    r.sums[block] = 0;
    if (r.maxima[block] < kept.last.logit) continue;
    for (int64_t i = block * BLOCK; i < end_of(r, block); i += W) {
      const vf weights = kept_weights(r, kept, i);
      for (int j = 0; j < W; ++j) r.sums[block] += double(weights[j]);
    }
    r.total += r.sums[block];
  }
  const double target = uniform * r.total;
  double running = 0;
  int64_t last = 0;
  for (int64_t block = 0; block < r.num_blocks; ++block) {
    if (running + r.sums[block] <= target) {
      running += r.sums[block];
      continue;
    }
    for (int64_t i = block * BLOCK; i < end_of(r, block); i += W) {
      const vf weights = kept_weights(r, kept, i);
      for (int j = 0; j < W && i + j < r.size; ++j) {
        if (!(weights[j] > 0)) continue;
        last = i + j;
        running += double(weights[j]);
        if (running > target) return last;
      }
    }
    return last;  // the two levels round differently
  }
  return find_largest(r, false);
}

static int64_t sample_row(const SampleArgs& a, int64_t number, char* memory) {
  Row r = row_at(a.logits + number * a.stride, a.vocab_size, memory);
  const bool is_sound = find_maxima(r);
  const bool is_finite = r.largest < __builtin_inff() && r.largest > -__builtin_inff();
  if (a.is_all_greedy || a.temperature[number] == 0 || !is_sound || !is_finite) return find_largest(r, !is_sound);
  r.temperature = a.temperature[number];
  const double uniform = double(a.uniform[number]);
  const int64_t top_k = a.needs_filter ? a.top_k[number] : a.vocab_size;
  const float top_p = a.needs_filter ? a.top_p[number] : 1.0f, min_p = a.needs_filter ? a.min_p[number] : 0.0f;
  if (top_k >= a.vocab_size) sum_weights(r);
  if (top_k >= a.vocab_size && top_p >= 1 && min_p <= 0)
    return draw_kept(r, {{-__builtin_inff(), INT32_MAX}, 0.0f}, uniform, true);
  const bool has_rank = top_k < a.vocab_size || top_p < 1;
  const int64_t few = FEW < r.num_blocks / 4 ? FEW : r.num_blocks / 4 + 1;
  const int64_t count = top_k < a.vocab_size && top_k > few && top_k < r.num_blocks / 2 ? top_k : few;
  const int64_t num_candidates = has_rank ? list_candidates(r, count) : 0;
  return draw_kept(r, filter(r, num_candidates, top_k, top_p, min_p), uniform, false);
}

static bool sample(const SampleArgs& a) {
  const int threads = threads_of(a.num_rows, a.num_rows * a.vocab_size * (a.is_all_greedy ? 1 : 8));
  bool has_memory = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : has_memory)
  {
    char* memory = static_cast<char*>(__builtin_malloc(size_t(row_bytes(a.vocab_size))));
    has_memory = memory != nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < a.num_rows; ++row)
      if (memory) a.out[row] = sample_row(a, row, memory);
    __builtin_free(memory);
  }
  return has_memory;
}

// --- log-probabilities -----------------------------------------------------------------------------------------------

static int64_t count_larger(const Row& r, float logit) {
  int64_t count = 0;
  const vf border = splat(logit);
  for (int64_t block = 0; block < r.num_blocks; ++block) {
    if (!(r.maxima[block] > logit)) continue;
    vi larger{};
    for (int64_t i = block * BLOCK; i < end_of(r, block); i += W)
      larger -= load_logits(r.logits + i, r.size - i) > border;
    for (int i = 0; i < W; ++i) count += larger[i];
  }
  return count;
}

static void logprobs_of_row(const LogprobArgs& a, int64_t number, char* memory) {
  Row r = row_at(a.logits + number * a.stride, a.vocab_size, memory);
  find_maxima(r);
  sum_weights(r);
  const double log_sum = __builtin_log(r.total);
  const float logit = r.logits[a.chosen[number]];
  a.selected[number] = float(double(logit) - double(r.largest) - log_sum);
  a.ranks[number] = count_larger(r, logit) + 1;
  if (a.num_top == 0) return;
  int64_t n = list_candidates(r, a.num_top);
  for (int64_t i = 0; n < a.num_top && i < r.size; ++i)  // hardly ever: fewer than that are finite
    if (!(r.logits[i] > -__builtin_inff())) r.candidates[n++] = {r.logits[i], int32_t(i)};
  for (int64_t i = 0; i < a.num_top; ++i) {
    const Candidate& best = r.candidates[i];
    a.top_ids[number * a.num_top + i] = best.id;
    a.top_logprobs[number * a.num_top + i] = float(double(best.logit) - double(r.largest) - log_sum);
  }
}

static bool logprobs(const LogprobArgs& a) {
  const int threads = threads_of(a.num_rows, a.num_rows * a.vocab_size * 8);
  bool has_memory = true;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(&& : has_memory)
  {
    char* memory = static_cast<char*>(__builtin_malloc(size_t(row_bytes(a.vocab_size))));
    has_memory = memory != nullptr;
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < a.num_rows; ++row)
      if (memory) logprobs_of_row(a, row, memory);
    __builtin_free(memory);
  }
  return has_memory;
}

// --- masks -----------------------------------------------------------------------------------------------------------

static void mask_tokens(const MaskArgs& a) {
  const int threads = threads_of(a.num_rows, a.num_rows * a.vocab_size);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t k = 0; k < a.num_rows; ++k) {
    float* logits = a.logits + a.rows[k] * a.stride;
    const uint32_t* words = a.mask + k * a.mask_stride;
    for (int64_t first = 0; first < a.vocab_size; first += 32) {
      const uint32_t word = words[first / 32];
      const int64_t n = a.vocab_size - first < 32 ? a.vocab_size - first : 32;
      if (word == 0xffffffffu) continue;
      for (int64_t i = 0; i < n; ++i) logits[first + i] = word >> i & 1u ? logits[first + i] : -__builtin_inff();
    }
  }
}
