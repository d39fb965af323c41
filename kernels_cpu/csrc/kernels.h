// The table of kernels: one instance for each ISA level, filled by kernels.cpp, chosen by module.cpp.
#pragma once
#include <cstdint>

namespace quire {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct Table {
  const char* name;
  void (*rms_norm)(DType, const void* x, const void* weight, void* out, int64_t rows, int64_t n, int64_t x_stride,
                   int64_t out_stride, float eps);
};

}  // namespace quire
