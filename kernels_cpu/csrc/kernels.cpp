// Compiled once for each ISA level. Everything lives in namespace QUIRE_ISA or is static, and no inline function of the
// standard library is called: one that was compiled for AVX-512 and merged by the linker would crash older machines.
#include "kernels.h"
#include "team.h"

#include <cstddef>
#include <type_traits>
#include <utility>
#if defined(__x86_64__) && defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define QUIRE_CAT_(a, b) a##b
#define QUIRE_CAT(a, b) QUIRE_CAT_(a, b)
#define QUIRE_STR_(x) #x
#define QUIRE_STR(x) QUIRE_STR_(x)

namespace quire {
namespace QUIRE_ISA {
#include "vectors.h"
// vectors.h comes first.
#include "elementwise.h"
#include "attention.h"

static void rms_norm(const NormArgs& a) {
  if (a.dtype == DType::f32) return rms_norm_of<float>(a);
  if (a.dtype == DType::bf16) return rms_norm_of<bf16>(a);
  rms_norm_of<f16>(a);
}

static void gated_activation(const GateArgs& a) {
  if (a.dtype == DType::f32) return gated_of<float>(a);
  if (a.dtype == DType::bf16) return gated_of<bf16>(a);
  gated_of<f16>(a);
}

static void write_any_cache(const CacheWriteArgs& a) {
  if (a.stored == Stored::plain) return write_cache(a);
  if (a.dtype == DType::f32) return write_narrow<float>(a);
  if (a.dtype == DType::bf16) return write_narrow<bf16>(a);
  write_narrow<f16>(a);
}

static void rotary(const RotaryArgs& a) {
  if (a.dtype == DType::f32) return rotary_of<float>(a);
  if (a.dtype == DType::bf16) return rotary_of<bf16>(a);
  rotary_of<f16>(a);
}
}  // namespace QUIRE_ISA

extern const Table QUIRE_CAT(table_, QUIRE_ISA);
const Table QUIRE_CAT(table_, QUIRE_ISA) = {
    QUIRE_STR(QUIRE_ISA),   QUIRE_ISA::paged_attention,  QUIRE_ISA::write_any_cache,
    QUIRE_ISA::rms_norm,    QUIRE_ISA::gated_activation, QUIRE_ISA::rotary,
};
}  // namespace quire
