// The quantizing of weights for Python. Shapes and dtypes are checked in Python (kernels_cpu/quantization.py).
#include "quantize_module.h"

#include "levels.h"

namespace nb = nanobind;

namespace quire {

template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

static void quantize(int bits, int dtype, uintptr_t weight, uintptr_t codes, uintptr_t scales, uintptr_t zeros,
                     int64_t num_outputs, int64_t num_inputs, int64_t row_stride, int64_t group_size) {
  const QuantizeArgs a{DType(dtype), at<const void>(weight), at<uint8_t>(codes), at<void>(scales), at<uint8_t>(zeros),
                       num_outputs,  num_inputs,             row_stride,         group_size};
  nb::gil_scoped_release released;
  const QuantizeTable& table = *chosen_level().quantize;
  (bits == 4 ? table.int4 : table.int8)(a);
}

void bind_quantize(nb::module_& m) { m.def("quantize", &quantize); }

}  // namespace quire
