// The quantizing of weights at load: what module and ISA levels agree on. The definition, operation by operation, is
// that of core/models/weights/quantization.py, whose bits every level gives.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace quire {

// 8 bits: one scale for each row. 4 bits: one in bfloat16 and a zero for each group of a row.
struct QuantizeArgs {
  DType dtype;         // of weight
  const void* weight;  // [N, K]
  uint8_t* codes;      // [N, K], or [N, K / 2]: input 2j in the low half of byte j
  void* scales;        // float [N], or bfloat16 [N, K / group_size]
  uint8_t* zeros;      // [N, K / group_size]; 8 bits: null
  int64_t num_outputs, num_inputs, row_stride;
  int64_t group_size;  // 4 bits: 16, 32, 64 or 128
};

struct QuantizeTable {
  void (*int8)(const QuantizeArgs&);
  void (*int4)(const QuantizeArgs&);
};

}  // namespace quire
