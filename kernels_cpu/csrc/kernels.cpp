// Compiled once for each ISA level. Everything lives in namespace QUIRE_ISA or is static, and nothing of the standard
// library is called: an inline function compiled for AVX-512 and merged by the linker would crash older machines.
#include "kernels.h"

#define QUIRE_CAT_(a, b) a##b
#define QUIRE_CAT(a, b) QUIRE_CAT_(a, b)
#define QUIRE_STR_(x) #x
#define QUIRE_STR(x) QUIRE_STR_(x)

namespace quire {
namespace QUIRE_ISA {
static void rms_norm(DType, const void* x_, const void* w_, void* out_, int64_t rows, int64_t n, int64_t xs, int64_t os,
                     float eps) {
  const float* x = static_cast<const float*>(x_);
  const float* w = static_cast<const float*>(w_);
  float* out = static_cast<float*>(out_);
  for (int64_t r = 0; r < rows; ++r) {
    float s = 0.f;
    for (int64_t i = 0; i < n; ++i) s += x[r * xs + i] * x[r * xs + i];
    const float q = 1.f / __builtin_sqrtf(s / n + eps);
    for (int64_t i = 0; i < n; ++i) out[r * os + i] = x[r * xs + i] * q * w[i];
  }
}
}  // namespace QUIRE_ISA
extern const Table QUIRE_CAT(table_, QUIRE_ISA);
const Table QUIRE_CAT(table_, QUIRE_ISA) = {QUIRE_STR(QUIRE_ISA), QUIRE_ISA::rms_norm};
}  // namespace quire
