// Holds the linear layers of one ISA level against loops in double: for machines that are only emulated here.
// Compiled with kernels_cpu/csrc/linear.cpp and the same -DQUIRE_ISA; prints what failed and returns how much did.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../kernels_cpu/csrc/linear_pack.h"

#define QUIRE_CAT_(a, b) a##b
#define QUIRE_CAT(a, b) QUIRE_CAT_(a, b)

namespace quire {
extern const LinearTable QUIRE_CAT(linear_, QUIRE_ISA);
}
using namespace quire;

static std::mt19937 rng(7);
static int num_failed = 0;

static float draw() { return std::normal_distribution<float>()(rng); }
static int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

static void expect(const char* what, const std::vector<float>& out, const std::vector<double>& wanted,
                   const std::vector<double>& sizes) {
  for (size_t i = 0; i < out.size(); ++i)
    if (!(std::fabs(out[i] - wanted[i]) <= 1e-5 * sizes[i] + 1e-6)) {
      std::printf("%s: entry %zu is %g, expected %g\n", what, i, out[i], wanted[i]);
      ++num_failed;
      return;
    }
}

static void try_float32(int64_t rows, int64_t n, int64_t k) {
  std::vector<float> x(rows * k), weight(n * k), out(rows * n);
  for (float& v : x) v = draw();
  for (float& v : weight) v = draw();
  LinearWeights w{};
  w.format = Format::f32;
  set_sizes(w, n, k, 0);
  std::vector<uint32_t> lanes(num_lanes(w.format, n, k));
  pack_lanes(w.format, reinterpret_cast<uint8_t*>(weight.data()), k * 4, n, k, lanes.data());
  w.lanes = lanes.data();
  QUIRE_CAT(linear_, QUIRE_ISA).multiply({&w, DType::f32, x.data(), out.data(), rows, k, n});
  std::vector<double> wanted(rows * n), sizes(rows * n);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t o = 0; o < n; ++o)
      for (int64_t i = 0; i < k; ++i) {
        const double term = double(x[m * k + i]) * weight[o * k + i];
        wanted[m * n + o] += term, sizes[m * n + o] += std::fabs(term);
      }
  expect("float32", out, wanted, sizes);
}

static uint16_t narrow(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return uint16_t(bits >> 16);
}
static float wide(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

static void try_bfloat16(int64_t rows, int64_t n, int64_t k) {
  std::vector<uint16_t> x(rows * k), weight(n * k), out(rows * n);
  for (uint16_t& v : x) v = narrow(draw());
  for (uint16_t& v : weight) v = narrow(draw());
  LinearWeights w{};
  w.format = Format::bf16;
  set_sizes(w, n, k, 0);
  std::vector<uint32_t> lanes(num_lanes(w.format, n, k));
  pack_lanes(w.format, reinterpret_cast<uint8_t*>(weight.data()), k * 2, n, k, lanes.data());
  w.lanes = lanes.data();
  QUIRE_CAT(linear_, QUIRE_ISA).multiply({&w, DType::bf16, x.data(), out.data(), rows, k, n});
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t o = 0; o < n; ++o) {
      double wanted = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term = double(wide(x[m * k + i])) * wide(weight[o * k + i]);
        wanted += term, size += std::fabs(term);
      }
      if (!(std::fabs(wide(out[m * n + o]) - wanted) <= std::fabs(wanted) / 128 + 1e-5 * size + 1e-6)) {
        std::printf("bfloat16: %g, expected %g\n", wide(out[m * n + o]), wanted), ++num_failed;
        return;
      }
    }
}

static void try_codes(Format format, Rounding rounding, int64_t rows, int64_t n, int64_t k, int64_t group) {
  const int bits = format == Format::u8 ? 8 : 4;
  const int64_t row_bytes = (k * bits + 7) / 8;
  std::vector<uint8_t> codes(n * row_bytes);
  for (uint8_t& v : codes) v = uint8_t(rng());
  std::vector<float> x(rows * k), out(rows * n);
  for (float& v : x) v = draw();
  LinearWeights w{};
  w.format = format, w.rounding = rounding, w.zero = 1 << (bits - 1);
  set_sizes(w, n, k, group);
  std::vector<uint32_t> lanes(num_lanes(format, n, k));
  pack_lanes(format, codes.data(), row_bytes, n, k, lanes.data());
  std::vector<float> scales(panels_of(n) * w.num_groups * PANEL);
  for (float& v : scales) v = 0.01f + 0.01f * std::fabs(draw());
  w.lanes = lanes.data(), w.scale_dtype = DType::f32, w.scales = scales.data();
  QUIRE_CAT(linear_, QUIRE_ISA).multiply({&w, DType::f32, x.data(), out.data(), rows, k, n});
  std::vector<double> wanted(rows * n), sizes(rows * n);
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t g = 0; g * w.group_size < k; ++g) {
      const int64_t first = g * w.group_size, end = std::min(k, first + w.group_size);
      const bool by_group = rounding == Rounding::by_group;
      float most = 0;
      for (int64_t i = by_group ? first : 0; i < (by_group ? end : k); ++i) most = std::max(most, std::fabs(x[m * k + i]));
      const float scale = most / 127.0f;
      for (int64_t o = 0; o < n; ++o)
        for (int64_t i = first; i < end; ++i) {
          const double value = rounding == Rounding::none ? x[m * k + i] : std::nearbyint(x[m * k + i] / scale) * double(scale);
          const uint8_t byte = codes[o * row_bytes + (bits == 8 ? i : i / 2)];
          const int code = bits == 8 ? byte : byte >> (4 * (i % 2)) & 15;
          const double weight = (code - w.zero) * double(scales[(o / PANEL * w.num_groups + g) * PANEL + o % PANEL]);
          wanted[m * n + o] += value * weight, sizes[m * n + o] += std::fabs(value * weight);
        }
    }
  expect(bits == 8 ? "8 bits" : "4 bits", out, wanted, sizes);
}

static void try_fixed_shapes() {
  for (const int64_t rows : {1, 2, 3, 5, 9, 41}) {
    try_float32(rows, 130, 37);
    try_bfloat16(rows, 130, 37);
    for (const Rounding rounding : {Rounding::none, Rounding::by_token, Rounding::by_group}) {
      try_codes(Format::u8, rounding, rows, 70, 96, 0);
      try_codes(Format::u8, rounding, rows, 70, 53, 0);
      try_codes(Format::u4, rounding, rows, 130, 128, 32);
    }
  }
}

// Without arguments the shapes above; with one, those on standard input: "bits rounding rows outputs inputs group".
int main(int argc, char**) {
  if (argc < 2) try_fixed_shapes();
  int bits, rounding;
  long long rows, n, k, group;
  while (argc > 1 && std::scanf("%d %d %lld %lld %lld %lld", &bits, &rounding, &rows, &n, &k, &group) == 6) {
    if (bits == 32) try_float32(rows, n, k);
    else if (bits == 16) try_bfloat16(rows, n, k);
    else try_codes(bits == 8 ? Format::u8 : Format::u4, Rounding(rounding), rows, n, k, group);
  }
  std::printf("%d failed\n", num_failed);
  return num_failed;
}
