// Runs the kernels of one ISA level over random odd shapes, every array exactly as long as it must be, and holds what
// is short to write down against loops in double: for sanitizers, and for machines that are only emulated here.
// Compiled with kernels_cpu/csrc/{kernels,layers}.cpp and the same -DQUIRE_ISA; prints what failed, returns how much.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../../kernels_cpu/csrc/layers.h"
#include "../../kernels_cpu/csrc/linear_pack.h"

#define QUIRE_CAT_(a, b) a##b
#define QUIRE_CAT(a, b) QUIRE_CAT_(a, b)

namespace quire {
extern const Table QUIRE_CAT(table_, QUIRE_ISA);
extern const LayerTable QUIRE_CAT(layers_, QUIRE_ISA);
}  // namespace quire
using namespace quire;

static const Table& kernels = QUIRE_CAT(table_, QUIRE_ISA);
static const LayerTable& layers = QUIRE_CAT(layers_, QUIRE_ISA);
static std::mt19937 rng(11);
static int num_failed = 0;

static int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }
static std::vector<float> draw(int64_t n, float scale = 1.0f) {
  std::vector<float> values(static_cast<size_t>(n));
  for (float& v : values) v = scale * std::normal_distribution<float>()(rng);
  return values;
}
static std::vector<float> rates(int64_t n, float sign) {
  std::vector<float> values = draw(n);
  for (float& v : values) v = sign * std::fabs(v) * 0.5f;
  return values;
}

static void expect(const char* what, const std::vector<float>& out, const std::vector<double>& wanted,
                   double tolerance = 1e-4) {
  for (size_t i = 0; i < out.size(); ++i)
    if (!(std::fabs(out[i] - wanted[i]) <= tolerance * (1 + std::fabs(wanted[i])))) {
      std::printf("%s: entry %zu is %g, expected %g\n", what, i, out[i], wanted[i]);
      ++num_failed;
      return;
    }
}

static void try_scans() {
  const int64_t S = pick(1, 3), M = 2, G = pick(1, 2), P = pick(1, 40), N = pick(1, 40);
  std::vector<int32_t> starts{0};
  for (int64_t s = 0; s < S; ++s) starts.push_back(starts.back() + int32_t(pick(0, 40)));
  const int64_t T = starts.back();
  const auto rows_of = [&](int64_t stride) { return Rows{starts.data(), starts.data() + 1, S, nullptr, nullptr, stride}; };
  const auto x = draw(T * M * P), b = draw(T * G * N), c = draw(T * G * N), d = draw(M), a = rates(M, -1), dt = rates(T * M, 1);
  auto states = draw(S * M * P * N);
  std::vector<double> h(states.begin(), states.end()), wanted(T * M * P);
  std::vector<float> out(T * M * P);
  layers.ssd_scan({DType::f32, x.data(), dt.data(), a.data(), {DType::f32, b.data(), G * N}, {DType::f32, c.data(), G * N},
                   d.data(), states.data(), out.data(), rows_of(M * P * N), M, P, G, N, M * P, M});
  for (int64_t s = 0; s < S; ++s)
    for (int64_t t = starts[s]; t < starts[s + 1]; ++t)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t p = 0; p < P; ++p) {
          const double value = x[(t * M + m) * P + p];
          double sum = d[m] * value;
          for (int64_t n = 0; n < N; ++n) {
            double& at = h[((s * M + m) * P + p) * N + n];
            const int64_t g = (t * G + m / (M / G)) * N + n;
            at = std::exp(double(dt[t * M + m]) * a[m]) * at + dt[t * M + m] * value * b[g];
            sum += at * c[g];
          }
          wanted[(t * M + m) * P + p] = sum;
        }
  expect("ssd_scan", out, wanted);
  expect("states of ssd_scan", states, h);

  auto keys = b;
  for (float& v : keys) v *= 0.2f;
  states = draw(S * M * N * P), h.assign(states.begin(), states.end());
  const auto decay = rates(T * M, -1), beta = rates(T * M, 1);
  layers.delta_rule({DType::f32, x.data(), {DType::f32, c.data(), G * N}, {DType::f32, keys.data(), G * N}, decay.data(),
                     beta.data(), states.data(), out.data(), rows_of(M * N * P), M, P, G, N, M * P, M, M});
  for (int64_t s = 0; s < S; ++s)
    for (int64_t t = starts[s]; t < starts[s + 1]; ++t)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t p = 0; p < P; ++p) {
          const int64_t g = (t * G + m / (M / G)) * N;
          double recalled = 0, sum = 0;
          for (int64_t n = 0; n < N; ++n) {
            double& at = h[((s * M + m) * N + n) * P + p];
            at *= std::exp(double(decay[t * M + m]));
            recalled += at * keys[g + n];
          }
          for (int64_t n = 0; n < N; ++n) {
            double& at = h[((s * M + m) * N + n) * P + p];
            at += keys[g + n] * (beta[t * M + m] * (x[(t * M + m) * P + p] - recalled));
            sum += at * c[g + n];
          }
          wanted[(t * M + m) * P + p] = sum;
        }
  expect("gated_delta_rule", out, wanted);

  const int64_t C = M * P, taps = pick(1, 5);
  const auto weight = draw(C * taps), a2 = rates(C * N, -1), dt2 = rates(T * C, 1), d2 = draw(C);
  auto conv_states = draw(S * C * (taps - 1)), scan_states = draw(S * C * N);
  layers.conv({DType::f32, x.data(), weight.data(), nullptr, conv_states.data(), out.data(), rows_of(C * (taps - 1)), C, taps,
               C, true});
  layers.selective_scan({DType::f32, x.data(), dt2.data(), a2.data(), {DType::f32, b.data(), G * N},
                         {DType::f32, c.data(), G * N}, d2.data(), scan_states.data(), out.data(), rows_of(C * N), C, N, C,
                         C});
}

// softplus, and the gate after a scan with and without its norm.
static void try_gates() {
  const int64_t T = pick(1, 5), G = pick(1, 3), P = pick(1, 40), n = G * P;
  const auto x = draw(T * n, 6.0f), bias = draw(n), gate = draw(T * n), weight = draw(n);
  auto y = draw(T * n);
  std::vector<float> soft(T * n);
  layers.soften({DType::f32, x.data(), bias.data(), soft.data(), T, n, n});
  std::vector<double> wanted(T * n);
  for (int64_t i = 0; i < T * n; ++i) wanted[i] = std::log1p(std::exp(double(x[i]) + bias[i % n]));
  expect("softplus", soft, wanted);
  for (const bool has_norm : {false, true})
    for (const bool is_first : {false, true}) {
      auto out = y;
      layers.open_gate({DType::f32, out.data(), gate.data(), has_norm ? weight.data() : nullptr, T, n, has_norm ? G : 1, n,
                        1e-5f, is_first});
      for (int64_t part = 0; part < T * G; ++part) {
        double sum = 0;
        const auto opened = [&](int64_t i) { return y[i] * (gate[i] / (1 + std::exp(-double(gate[i])))); };
        for (int64_t i = part * P; i < part * P + P; ++i) sum += is_first ? double(y[i]) * y[i] : opened(i) * opened(i);
        for (int64_t i = part * P; i < part * P + P; ++i)
          wanted[i] = opened(i) * (has_norm ? weight[i % n] / std::sqrt(sum / P + 1e-5) : 1.0);
      }
      expect("gate", out, wanted);
    }
}

struct Packed {
  std::vector<uint32_t> lanes;
  std::vector<LinearWeights> layers;
  Packed(const std::vector<float>& weights, int64_t count, int64_t n, int64_t k) {
    const int64_t size = num_lanes(Format::f32, n, k);
    lanes.resize(static_cast<size_t>(count * size));
    for (int64_t e = 0; e < count; ++e) {
      const auto* rows = reinterpret_cast<const uint8_t*>(weights.data() + e * n * k);
      pack_lanes(Format::f32, rows, k * 4, n, k, lanes.data() + e * size);
      LinearWeights w{};
      w.lanes = lanes.data() + e * size;
      set_sizes(w, n, k, 0);
      layers.push_back(w);
    }
  }
};

// Experts of codes, and what they mean in double: of weights [n, k] of each.
struct PackedCodes {
  std::vector<std::vector<uint32_t>> lanes;
  std::vector<std::vector<float>> scales;
  std::vector<LinearWeights> layers;
  std::vector<double> meant;  // [E, n, k]
  PackedCodes(Format format, Rounding rounding, int64_t count, int64_t n, int64_t k, int64_t group) {
    const int bits = format == Format::u8 ? 8 : 4;
    const int64_t row_bytes = (k * bits + 7) / 8;
    for (int64_t e = 0; e < count; ++e) {
      LinearWeights w{};
      w.format = format, w.rounding = rounding, w.zero = 1 << (bits - 1);
      set_sizes(w, n, k, group);
      std::vector<uint8_t> codes(static_cast<size_t>(n * row_bytes));
      for (uint8_t& v : codes) v = uint8_t(rng());
      lanes.emplace_back(static_cast<size_t>(num_lanes(format, n, k)));
      pack_lanes(format, codes.data(), row_bytes, n, k, lanes.back().data());
      scales.emplace_back(static_cast<size_t>((n + PANEL - 1) / PANEL * w.num_groups * PANEL));
      for (float& v : scales.back()) v = (bits == 8 ? 0.001f : 0.02f) * (1 + std::fabs(draw(1)[0]));
      w.lanes = lanes.back().data(), w.scale_dtype = DType::f32, w.scales = scales.back().data();
      layers.push_back(w);
      for (int64_t o = 0; o < n; ++o)
        for (int64_t i = 0; i < k; ++i) {
          const uint8_t byte = codes[size_t(o * row_bytes + (bits == 8 ? i : i / 2))];
          const int code = bits == 8 ? byte : byte >> (4 * (i % 2)) & 15;
          const int64_t panel = o / PANEL * w.num_groups + i / w.group_size;
          meant.push_back((code - w.zero) * double(scales.back()[size_t(panel * PANEL + o % PANEL)]));
        }
    }
  }
};

// A row as its products read it.
static std::vector<double> rounded(const std::vector<double>& row, const LinearWeights& w) {
  std::vector<double> out = row;
  const size_t size = w.rounding == Rounding::by_group ? size_t(w.group_size) : row.size();
  for (size_t first = 0; w.rounding != Rounding::none && first < row.size(); first += size) {
    const size_t end = std::min(row.size(), first + size);
    float most = 0;
    for (size_t i = first; i < end; ++i) most = std::max(most, std::fabs(float(row[i])));
    const float scale = most / 127.0f;
    for (size_t i = first; i < end; ++i) out[i] = scale > 0 ? std::nearbyint(float(row[i]) / scale) * double(scale) : 0.0;
  }
  return out;
}

static void try_expert_codes(Format format, Rounding rounding, int64_t group) {
  const bool is_grouped = group > 0;
  const int64_t T = pick(0, 12), E = pick(2, 4), k = 2;
  const int64_t H = is_grouped ? group * pick(1, 3) : pick(1, 80), I = is_grouped ? group * pick(1, 3) : pick(1, 80);
  const PackedCodes up(format, rounding, E, 2 * I, H, group), down(format, rounding, E, H, I, group);
  const auto x = draw(T * H), shares = draw(T * k);
  std::vector<int64_t> chosen;
  for (int64_t t = 0; t < T; ++t) chosen.push_back(pick(0, E - 2)), chosen.push_back(E - 1);
  std::vector<float> out(static_cast<size_t>(T * H));
  ExpertArgs a{};
  a.gate_up = up.layers.data(), a.down = down.layers.data(), a.num_experts = E;
  a.x = x.data(), a.shares = shares.data(), a.chosen = chosen.data(), a.out = out.data();
  a.tokens = T, a.num_chosen = k, a.x_stride = H, a.out_stride = H;
  layers.experts(a);
  std::vector<double> wanted(static_cast<size_t>(T * H));
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t e = chosen[t * k + j];
      const auto read = rounded({x.begin() + t * H, x.begin() + t * H + H}, up.layers[0]);
      std::vector<double> inner;
      for (int64_t i = 0; i < I; ++i) {
        double gate = 0, other = 0;
        for (int64_t n = 0; n < H; ++n) {
          gate += up.meant[(e * 2 * I + i) * H + n] * read[n];
          other += up.meant[(e * 2 * I + I + i) * H + n] * read[n];
        }
        inner.push_back(gate / (1 + std::exp(-gate)) * other);
      }
      inner = rounded(inner, down.layers[0]);
      for (int64_t n = 0; n < H; ++n)
        for (int64_t i = 0; i < I; ++i) wanted[t * H + n] += shares[t * k + j] * inner[i] * down.meant[(e * H + n) * I + i];
    }
  // Another order of a sum may round an activation to the next code.
  expect("experts of codes", out, wanted, rounding == Rounding::none ? 1e-4 : 3e-2);
}

static void try_experts() {
  const int64_t T = pick(0, 20), E = pick(2, 5), H = pick(1, 80), I = pick(1, 80), k = 2;
  const auto up = draw(E * 2 * I * H, 0.2f), down = draw(E * H * I, 0.2f), x = draw(T * H), shares = draw(T * k);
  std::vector<int64_t> chosen;
  for (int64_t t = 0; t < T; ++t) chosen.push_back(pick(0, E - 2)), chosen.push_back(E - 1);
  std::vector<float> out(T * H);
  const Packed packed_up(up, E, 2 * I, H), packed_down(down, E, H, I);
  ExpertArgs a{};
  a.gate_up = packed_up.layers.data(), a.down = packed_down.layers.data(), a.num_experts = E;
  a.x = x.data(), a.shares = shares.data(), a.chosen = chosen.data(), a.out = out.data();
  a.tokens = T, a.num_chosen = k, a.x_stride = H, a.out_stride = H;
  layers.experts(a);
  std::vector<double> wanted(T * H);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < k; ++j) {
      const int64_t e = chosen[t * k + j];
      for (int64_t i = 0; i < I; ++i) {
        double gate = 0, other = 0;
        for (int64_t n = 0; n < H; ++n) {
          gate += double(up[(e * 2 * I + i) * H + n]) * x[t * H + n];
          other += double(up[(e * 2 * I + I + i) * H + n]) * x[t * H + n];
        }
        const double inner = gate / (1 + std::exp(-gate)) * other;
        for (int64_t n = 0; n < H; ++n) wanted[t * H + n] += shares[t * k + j] * inner * down[(e * H + n) * I + i];
      }
    }
  expect("experts", out, wanted);

  const auto weight = draw(2 * I * (H / 2 + 1));
  const auto heads = draw(T * 2 * (H / 2 + 1));
  std::vector<float> projected(T * 2 * I);
  layers.head_linear({DType::f32, heads.data(), weight.data(), projected.data(), T, 2, I, H / 2 + 1, 2 * (H / 2 + 1),
                      H / 2 + 1, I * (H / 2 + 1), H / 2 + 1, 1, 2 * I, I});
  layers.head_linear({DType::f32, heads.data(), weight.data(), projected.data(), T, 2, I, H / 2 + 1, 2 * (H / 2 + 1),
                      H / 2 + 1, I * (H / 2 + 1), 1, I, 2 * I, I});
  std::vector<float> weights(T * k), logits = draw(T * E);
  layers.route({logits.data(), nullptr, weights.data(), chosen.data(), T, E, k, 1, 1, E, 1.0f, false, true, false});
}

static void try_vocabulary() {
  const int64_t R = pick(1, 3), V = pick(1, 20000), top = pick(0, V < 30 ? V : 30), words = (V + 31) / 32;
  auto logits = draw(R * V, 3.0f);
  std::vector<int64_t> rows, ids(R), ranks(R), best(R * top), top_k;
  std::vector<float> selected(R), values(R * top), temperature(R, 0.8f), top_p, min_p(R, 0.001f), uniform;
  std::vector<uint32_t> mask(R * words);
  for (uint32_t& word : mask) word = uint32_t(rng());
  for (int64_t r = 0; r < R; ++r) {
    rows.push_back(r), top_k.push_back(pick(1, V)), top_p.push_back(pick(0, 1) ? 1.0f : 0.7f);
    uniform.push_back(float(pick(0, 999)) / 1000.0f);
  }
  layers.mask({logits.data(), rows.data(), mask.data(), R, V, V, words});
  SampleArgs a{logits.data(), temperature.data(), top_k.data(), top_p.data(), min_p.data(), uniform.data(), ids.data(),
               R, V, V, false, true};
  layers.sample(a);
  for (int64_t id : ids)
    if (id < 0 || id >= V) std::printf("sample: %lld of %lld\n", (long long)id, (long long)V), ++num_failed;
  layers.logprobs({logits.data(), ids.data(), selected.data(), ranks.data(), best.data(), values.data(), R, V, V, top});
  a.is_all_greedy = true;
  layers.sample(a);
  for (int64_t r = 0; r < R; ++r)
    for (int64_t i = 0; i < V; ++i)
      if (logits[r * V + i] > logits[r * V + ids[r]]) {
        std::printf("greedy: %g beats %g\n", logits[r * V + i], logits[r * V + ids[r]]), ++num_failed;
        return;
      }
}

// One request, its context written in eight bits and read back at once.
static void try_attention(Stored stored) {
  const int64_t Hk = pick(1, 2), Hq = Hk * pick(1, 3), D = pick(1, 80), B = pick(1, 20), T = pick(1, 90);
  const int64_t blocks = (T + B - 1) / B, size = stored == Stored::plain ? 4 : 1;
  const auto q = draw(T * Hq * D), k = draw(T * Hk * D);
  std::vector<char> cache(blocks * B * Hk * D * size);
  std::vector<float> scales(blocks * B * Hk), out(T * Hq * D);
  std::vector<int64_t> slots;
  std::vector<int32_t> table, lengths{int32_t(T)}, starts{0, int32_t(T)};
  for (int64_t t = 0; t < T; ++t) slots.push_back(t);
  for (int64_t b = 0; b < blocks; ++b) table.push_back(int32_t(b));
  kernels.write_cache({DType::f32, stored, 4, k.data(), cache.data(), scales.data(), slots.data(), T, Hk, D, B, Hk * D, D,
                       B * Hk * D, Hk * D, D});
  AttentionArgs a{};
  a.stored = stored, a.q = q.data(), a.k_cache = a.v_cache = cache.data(), a.out = out.data();
  a.k_scales = a.v_scales = scales.data();
  a.block_table = table.data(), a.seq_lens = lengths.data(), a.query_start_loc = starts.data();
  a.num_requests = 1, a.num_heads = Hq, a.num_kv_heads = Hk, a.head_size = D, a.v_head_size = D, a.block_size = B;
  a.q_token_stride = a.out_token_stride = Hq * D, a.q_head_stride = a.out_head_stride = D;
  a.k_block_stride = a.v_block_stride = B * Hk * D, a.k_slot_stride = a.v_slot_stride = Hk * D;
  a.k_head_stride = a.v_head_stride = D, a.table_stride = blocks, a.scale = 0.1f;
  kernels.paged_attention(a);
  for (int64_t i = 0; i < Hq * D; ++i) {  // the first token sees itself alone
    const double wanted = k[i / D / (Hq / Hk) * D + i % D], error = stored == Stored::e5m2 ? 0.13 : 0.07;
    if (!(std::fabs(out[i] - wanted) <= error * std::fabs(wanted) + 0.02)) {
      std::printf("attention: %g, expected %g\n", out[i], wanted), ++num_failed;
      return;
    }
  }
}

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  for (int i = 0; i < rounds; ++i) {
    try_scans();
    try_gates();
    try_experts();
    for (const Rounding rounding : {Rounding::none, Rounding::by_token, Rounding::by_group}) {
      try_expert_codes(Format::u8, rounding, 0);
      try_expert_codes(Format::u4, rounding, 16 * pick(1, 2));
    }
    try_vocabulary();
    for (const Stored stored : {Stored::plain, Stored::int8, Stored::e4m3, Stored::e5m2}) try_attention(stored);
  }
  std::printf("%d failed\n", num_failed);
  return num_failed;
}
