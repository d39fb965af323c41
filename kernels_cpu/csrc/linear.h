// What the linear layers of all ISA levels agree on: how weights lie in memory, and the arguments of a product.
//
// Weights [N, K] are cut into panels of PANEL outputs. A panel is a list of slots; a slot holds PANEL lanes of 32 bits,
// and a lane the weights of one output for as many consecutive inputs as fit: 1 float32, 2 of half precision, 4 of
// 8 bits or 8 of 4 bits. So a vector register takes lanes of neighbouring outputs, each is multiplied with the same
// broadcast inputs, no sum runs across lanes, and every ISA level reads the same memory, front to back.
// Codes of 4 bits: byte b of a lane holds input b of its slot in the low half and input 4 + b in the high half.
// Outputs and inputs past the end are zero weights.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "team.h"

namespace quire {

constexpr int64_t PANEL = 64;  // outputs

enum class Format : int { f32 = 0, bf16 = 1, f16 = 2, u8 = 3, u4 = 4 };

// Inputs in one lane.
constexpr int64_t inputs_of(Format format) {
  return format == Format::f32 ? 1 : format == Format::u8 ? 4 : format == Format::u4 ? 8 : 2;
}

// How activations are rounded before they meet codes.
enum class Rounding : int { none = 0, by_token = 1, by_group = 2 };

struct LinearWeights {
  Format format;
  Rounding rounding;      // of the activations; only with u8 and u4
  const uint32_t* lanes;  // [panels, slots, PANEL]
  DType scale_dtype;
  const void* scales;      // [panels, groups, PANEL], or null: no codes
  const uint8_t* zeros;    // [panels, groups, PANEL], or null: `zero` everywhere
  const float* bias;       // [panels * PANEL], or null
  int64_t num_outputs, num_inputs, num_slots, group_size, num_groups;  // group_size counts inputs, padded to lanes
  int32_t zero;
};

struct LinearArgs {
  const LinearWeights* weights;
  DType dtype;      // of x and out
  const void* x;    // [rows, K]
  void* out;        // [rows, N]
  int64_t rows, x_stride, out_stride;
  Team* team = nullptr;  // whose leader calls
};

// What a product reads of its weights, in the shares that threads take.
static inline Ahead ahead_of(const LinearWeights& w) {
  return {reinterpret_cast<const char*>(w.lanes), (w.num_outputs + PANEL - 1) / PANEL, w.num_slots * PANEL * 4};
}

struct LinearTable {
  bool (*multiply)(const LinearArgs&);  // false: out of memory
};

}  // namespace quire
