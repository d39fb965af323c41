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

// source: rows of `row_bytes`; target: `num_lanes` lanes, all of them written.
inline void pack_lanes(Format format, const uint8_t* rows, int64_t row_bytes, int64_t num_outputs, int64_t num_inputs,
                       uint32_t* lanes) {
  const int64_t step = inputs_of(format), slots = padded_inputs(format, num_inputs) / step;
  const int64_t panels = (num_outputs + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < panels; ++panel)
    for (int64_t block = 0; block < slots; block += 16)  // a cache line of each row at a time
      for (int64_t n = 0; n < PANEL; ++n) {
        const int64_t output = panel * PANEL + n;
        const uint8_t* row = rows + output * row_bytes;
        for (int64_t slot = block; slot < slots && slot < block + 16; ++slot)
          lanes[(panel * slots + slot) * PANEL + n] =
              output < num_outputs && slot * step < num_inputs ? lane_of(format, row, slot * step, num_inputs) : 0;
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
