// The linear layers, compiled once for each ISA level, by the same rules as kernels.cpp.
#include "linear.h"

#include <cstddef>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(QUIRE_AMX_MODEL)
#include QUIRE_AMX_MODEL  // a header: the tiles in plain C++, for tests
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define QUIRE_CAT_(a, b) a##b
#define QUIRE_CAT(a, b) QUIRE_CAT_(a, b)

namespace quire {
namespace QUIRE_ISA {
namespace {
#include "vectors.h"
// vectors.h comes first, then each reads those before it.
#include "gemm_tiles.h"
#include "gemm.h"
#include "amx_tiles.h"
#include "gemm_run.h"
}  // namespace
}  // namespace QUIRE_ISA

extern const LinearTable QUIRE_CAT(linear_, QUIRE_ISA);
const LinearTable QUIRE_CAT(linear_, QUIRE_ISA) = {QUIRE_ISA::multiply};
}  // namespace quire
