// Linear layers for Python: a handle that is made once at load, and the packing of its weights.
// Shapes and dtypes are checked in Python (kernels_cpu/linear.py).
#include "linear_module.h"

#include <cstring>
#include <new>
#include <stdexcept>

#include "levels.h"

namespace nb = nanobind;

namespace quire {

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Inputs of a row with the zeros at its end: whole lanes, and whole vectors where activations are rounded.
static int64_t padded_inputs(Format format, int64_t num_inputs) {
  const int64_t step = format == Format::u8 || format == Format::u4 ? 16 : inputs_of(format);
  return (num_inputs + step - 1) / step * step;
}

static int64_t num_lanes(int format, int64_t num_outputs, int64_t num_inputs) {
  const int64_t panels = (num_outputs + PANEL - 1) / PANEL;
  return panels * PANEL * padded_inputs(Format(format), num_inputs) / inputs_of(Format(format));
}

// The lane of inputs [first, first + inputs_of) of one row.
static inline uint32_t lane_of(Format format, const uint8_t* row, int64_t first, int64_t num_inputs) {
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
static void pack_lanes(int format_code, uintptr_t source, int64_t row_bytes, int64_t num_outputs, int64_t num_inputs,
                       uintptr_t target) {
  const Format format = Format(format_code);
  const int64_t step = inputs_of(format), slots = padded_inputs(format, num_inputs) / step;
  const int64_t panels = (num_outputs + PANEL - 1) / PANEL;
  const uint8_t* rows = at<const uint8_t>(source);
  uint32_t* lanes = at<uint32_t>(target);
  nb::gil_scoped_release released;
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

class Linear {
 public:
  Linear(int format, int rounding, uintptr_t lanes, int scale_dtype, uintptr_t scales, uintptr_t zeros, uintptr_t bias,
         int64_t num_outputs, int64_t num_inputs, int64_t group_size, int32_t zero)
      : w_{} {
    const int64_t padded = padded_inputs(Format(format), num_inputs);
    w_.format = Format(format), w_.rounding = Rounding(rounding);
    w_.lanes = at<const uint32_t>(lanes);
    w_.scale_dtype = DType(scale_dtype);
    w_.scales = at<const void>(scales), w_.zeros = at<const uint8_t>(zeros), w_.bias = at<const float>(bias);
    w_.num_outputs = num_outputs, w_.num_inputs = num_inputs;
    w_.num_slots = padded / inputs_of(w_.format);
    w_.group_size = group_size ? group_size : padded;
    w_.num_groups = padded / w_.group_size;
    w_.zero = zero;
    if (padded % w_.group_size || w_.group_size % inputs_of(w_.format))
      throw std::invalid_argument("groups must divide the inputs");
  }

  void multiply(int dtype, uintptr_t x, uintptr_t out, int64_t rows, int64_t x_stride, int64_t out_stride) const {
    const LinearArgs a{&w_, DType(dtype), at<const void>(x), at<void>(out), rows, x_stride, out_stride};
    bool has_memory;
    {
      nb::gil_scoped_release released;
      has_memory = chosen_level().linear->multiply(a);
    }
    if (!has_memory) throw std::bad_alloc();
  }

 private:
  LinearWeights w_;
};

void bind_linear(nb::module_& m) {
  m.def("num_lanes", &num_lanes);
  m.def("pack_lanes", &pack_lanes);
  nb::class_<Linear>(m, "Linear")
      .def(nb::init<int, int, uintptr_t, int, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int32_t>())
      .def("multiply", &Linear::multiply);
}

}  // namespace quire
