// The packing of weights into lanes. Compiled for the baseline: it is bounded by memory.
#pragma once
#include <cstring>

#include "linear.h"

namespace quire {

// Inputs of a row with the zeros at its end: whole lanes, and whole vectors where activations are rounded.
inline int64_t padded_inputs(Format format, int64_t num_inputs) {
  const int64_t step = format == Format::u8 || format == Format::u4 ? 16 : inputs_of(format);
  return (num_inputs + step - 1) / step * step;
}

inline int64_t num_lanes(Format format, int64_t num_outputs, int64_t num_inputs) {
  const int64_t panels = (num_outputs + PANEL - 1) / PANEL;
  return panels * PANEL * padded_inputs(format, num_inputs) / inputs_of(format);
}

// The lane of inputs [first, first + inputs_of) of one row.
inline uint32_t lane_of(Format format, const uint8_t* row, int64_t first, int64_t num_inputs) {
  uint32_t lane = 0;
  const int64_t left = num_inputs - first;
  if (format == Format::f32) {
    std::memcpy(&lane, row + first * 4, 4);
  } else if (format == Format::u8) {
    std::memcpy(&lane, row + first, size_t(left < 4 ? left : 4));
  } else if (format == Format::u4) {
    uint8_t pairs[4] = {};  // byte j holds inputs 2j and 2j + 1
    std::memcpy(pairs, row + first / 2, size_t(left < 8 ? (left + 1) / 2 : 4));
    for (int i = 0; i < 8; ++i) {
      const uint32_t code = i < left ? pairs[i / 2] >> (4 * (i % 2)) & 15u : 0u;
      lane |= code << (8 * (i % 4) + (i / 4) * 4);
    }
  } else {
    std::memcpy(&lane, row + first * 2, left < 2 ? 2 : 4);
  }
  return lane;
}

// The nibbles of the low half of a word as bytes.
inline uint32_t spread_nibbles(uint32_t word) {
  word = (word | word << 8) & 0x00ff00ffu;
  return (word | word << 4) & 0x0f0f0f0fu;
}

// A lane none of whose inputs is missing, from the four bytes that hold them: what `lane_of` gives, without branches.
template <bool is_u4>
inline uint32_t whole_lane(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, 4);
  return is_u4 ? spread_nibbles(word & 0xffffu) | spread_nibbles(word >> 16) << 4 : word;
}

// One panel whose rows are all there; `whole` of its slots have all their inputs, and are read 16 at a time, since 64
// rows times one line stay in the first cache and lanes are written in order.
template <bool is_u4>
inline void pack_whole_panel(const uint8_t* rows, int64_t row_bytes, int64_t whole, uint32_t* lanes) {
  for (int64_t block = 0; block < whole; block += 16)
    for (int64_t slot = block; slot < whole && slot < block + 16; ++slot)
      for (int64_t n = 0; n < PANEL; ++n)
        lanes[slot * PANEL + n] = whole_lane<is_u4>(rows + n * row_bytes + slot * 4);
}

// source: rows of `row_bytes`; target: `num_lanes` lanes, all of them written.
inline void pack_lanes(Format format, const uint8_t* rows, int64_t row_bytes, int64_t num_outputs, int64_t num_inputs,
                       uint32_t* lanes) {
  const int64_t step = inputs_of(format), slots = padded_inputs(format, num_inputs) / step;
  const int64_t panels = (num_outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel) {
    const uint8_t* first = rows + panel * PANEL * row_bytes;
    uint32_t* target = lanes + panel * slots * PANEL;
    const int64_t rows_left = num_outputs - panel * PANEL;
    const int64_t whole = rows_left >= PANEL ? num_inputs / step : 0;
    (format == Format::u4 ? pack_whole_panel<true> : pack_whole_panel<false>)(first, row_bytes, whole, target);
    for (int64_t slot = whole; slot < slots; ++slot)
      for (int64_t n = 0; n < PANEL; ++n)
        target[slot * PANEL + n] = n < rows_left && slot * step < num_inputs
                                       ? lane_of(format, first + n * row_bytes, slot * step, num_inputs)
                                       : 0;
  }
}

// Fills in what follows from the sizes; group_size 0: the whole row. False: groups do not divide the inputs.
inline bool set_sizes(LinearWeights& w, int64_t num_outputs, int64_t num_inputs, int64_t group_size) {
  const int64_t padded = padded_inputs(w.format, num_inputs);
  w.num_outputs = num_outputs, w.num_inputs = num_inputs;
  w.num_slots = padded / inputs_of(w.format);
  w.group_size = group_size ? group_size : padded;
  w.num_groups = padded / w.group_size;
  return padded % w.group_size == 0 && w.group_size % inputs_of(w.format) == 0;
}

}  // namespace quire
