// Linear layers for Python: a handle that is made once at load, and the packing of its weights.
// Shapes and dtypes are checked in Python (kernels_cpu/linear.py).
#include "linear_module.h"

#include <new>
#include <stdexcept>

#include "levels.h"
#include "linear_pack.h"

namespace nb = nanobind;

namespace quire {

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static int64_t count_lanes(int format, int64_t num_outputs, int64_t num_inputs) {
  return num_lanes(Format(format), num_outputs, num_inputs);
}

static void pack(int format, uintptr_t source, int64_t row_bytes, int64_t num_outputs, int64_t num_inputs,
                 uintptr_t target) {
  nb::gil_scoped_release released;
  pack_lanes(Format(format), at<const uint8_t>(source), row_bytes, num_outputs, num_inputs, at<uint32_t>(target));
}

Linear::Linear(int format, int rounding, uintptr_t lanes, int scale_dtype, uintptr_t scales, uintptr_t zeros,
               uintptr_t bias, int64_t num_outputs, int64_t num_inputs, int64_t group_size, int32_t zero)
    : w_{} {
  w_.format = Format(format), w_.rounding = Rounding(rounding);
  w_.lanes = at<const uint32_t>(lanes);
  w_.scale_dtype = DType(scale_dtype);
  w_.scales = at<const void>(scales), w_.zeros = at<const uint8_t>(zeros), w_.bias = at<const float>(bias);
  w_.zero = zero;
  if (!set_sizes(w_, num_outputs, num_inputs, group_size))
    throw std::invalid_argument("groups must divide the inputs");
}

void Linear::multiply(int dtype, uintptr_t x, uintptr_t out, int64_t rows, int64_t x_stride, int64_t out_stride) const {
  const LinearArgs a{&w_, DType(dtype), at<const void>(x), at<void>(out), rows, x_stride, out_stride};
  bool has_memory;
  {
    nb::gil_scoped_release released;
    has_memory = chosen_level().linear->multiply(a);
  }
  if (!has_memory) throw std::bad_alloc();
}

// The sum of all words of some memory, each thread's part front to back: the floor of what reads weights.
static uint64_t read_memory(uintptr_t address, int64_t num_words) {
  nb::gil_scoped_release released;
  const uint64_t* words = at<const uint64_t>(address);
  constexpr int64_t STEP = 64;
  const int64_t steps = num_words / STEP;
  uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
  for (int64_t step = 0; step < steps; ++step) {
    const uint64_t* from = words + step * STEP;
    uint64_t sums[8] = {};
    for (int64_t i = 0; i < STEP; i += 8)
      for (int j = 0; j < 8; ++j) sums[j] += from[i + j];
    for (int j = 0; j < 8; ++j) total += sums[j];
  }
  return total;
}

void bind_linear(nb::module_& m) {
  m.def("num_lanes", &count_lanes);
  m.def("pack_lanes", &pack);
  m.def("read_memory", &read_memory);
  nb::class_<Linear>(m, "Linear")
      .def(nb::init<int, int, uintptr_t, int, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int32_t>())
      .def("multiply", &Linear::multiply);
}

}  // namespace quire
