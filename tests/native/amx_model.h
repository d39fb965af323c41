// The tiles of AMX in plain C++, so that the kernels that use them are tested where there are none. It stops the
// program where the processor would fault: a tile that is not configured, or shapes that do not fit.
// Source: Intel SDM, volume 2, LDTILECFG, TILELOADD, TILESTORED, TDPBSUD, TDPBF16PS.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx_model {
struct Tile {
  int rows = 0, bytes = 0;
  uint8_t data[16][64] = {};
};
inline thread_local Tile tiles[8];
inline thread_local bool is_configured = false;

inline void must(bool is_so, const char* what) {
  if (is_so) return;
  std::printf("AMX: %s\n", what);
  std::abort();
}
inline Tile& tile(int i) {
  must(is_configured && i >= 0 && i < 8 && tiles[i].rows > 0, "a tile that is not configured");
  return tiles[i];
}
inline void configure(const void* memory) {
  const auto* bytes = static_cast<const uint8_t*>(memory);
  must(bytes[0] == 1 && bytes[1] == 0, "palette or start row");
  for (int i = 0; i < 8; ++i) {
    uint16_t width;
    std::memcpy(&width, bytes + 16 + 2 * i, 2);
    must(width <= 64 && width % 4 == 0 && bytes[48 + i] <= 16, "a shape that no tile has");
    tiles[i] = Tile{bytes[48 + i], width, {}};
  }
  is_configured = true;
}
inline void release() { is_configured = false; }
inline void zero(int i) { std::memset(tile(i).data, 0, sizeof(Tile::data)); }
inline void load(int i, const void* from, int64_t stride) {
  Tile& t = tile(i);
  zero(i);
  for (int r = 0; r < t.rows; ++r) std::memcpy(t.data[r], static_cast<const char*>(from) + r * stride, t.bytes);
}
inline void store(int i, void* to, int64_t stride) {
  const Tile& t = tile(i);
  for (int r = 0; r < t.rows; ++r) std::memcpy(static_cast<char*>(to) + r * stride, t.data[r], t.bytes);
}
inline void must_fit(const Tile& c, const Tile& a, const Tile& b) {
  must(c.rows == a.rows && c.bytes == b.bytes && a.bytes == b.rows * 4, "shapes that do not fit");
}
inline float as_float(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void dot_signed_unsigned(int ic, int ia, int ib) {
  Tile &c = tile(ic), &a = tile(ia), &b = tile(ib);
  must_fit(c, a, b);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      int32_t sum;
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.bytes; ++k) sum += int8_t(a.data[m][k]) * int(b.data[k / 4][4 * n + k % 4]);
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}

inline void dot_bf16(int ic, int ia, int ib) {
  Tile &c = tile(ic), &a = tile(ia), &b = tile(ib);
  must_fit(c, a, b);
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      float sum, halves[2] = {};
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      for (int k = 0; k < a.bytes / 2; ++k) {
        uint16_t x, y;
        std::memcpy(&x, a.data[m] + 2 * k, 2);
        std::memcpy(&y, b.data[k / 2] + 4 * n + 2 * (k % 2), 2);
        halves[k % 2] = std::fma(as_float(x), as_float(y), halves[k % 2]);
      }
      sum += halves[0] + halves[1];
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
}
}  // namespace amx_model

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig amx_model::configure
#define _tile_release amx_model::release
#define _tile_loadd amx_model::load
#define _tile_stored amx_model::store
#define _tile_zero amx_model::zero
#define _tile_dpbsud amx_model::dot_signed_unsigned
#define _tile_dpbf16ps amx_model::dot_bf16
