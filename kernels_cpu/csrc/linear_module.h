#pragma once
#include <nanobind/nanobind.h>

#include "linear.h"

namespace quire {

// One linear layer: where its packed weights lie. Python keeps them alive.
class Linear {
 public:
  Linear(int format, int rounding, uintptr_t lanes, int scale_dtype, uintptr_t scales, uintptr_t zeros, uintptr_t bias,
         int64_t num_outputs, int64_t num_inputs, int64_t group_size, int32_t zero);

  void multiply(int dtype, uintptr_t x, uintptr_t out, int64_t rows, int64_t x_stride, int64_t out_stride) const;
  const LinearWeights& weights() const { return w_; }

 private:
  LinearWeights w_;
};

// Adds the linear layers to the Python module.
void bind_linear(nanobind::module_& m);
}  // namespace quire
