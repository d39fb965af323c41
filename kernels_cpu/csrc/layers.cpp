// Experts, recurrences and the vocabulary, compiled once for each ISA level, by the same rules as kernels.cpp.
#include "layers.h"

#include <cstddef>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#define QUIRE_CAT_(a, b) a##b
#define QUIRE_CAT(a, b) QUIRE_CAT_(a, b)

// The headers of the linear layers and of the small operators bring more than is used here.
#pragma GCC diagnostic ignored "-Wunused-function"

namespace quire {
namespace QUIRE_ISA {
namespace {
#include "vectors.h"
// vectors.h comes first, then each reads those before it.
#include "elementwise.h"
#include "gemm_tiles.h"
#include "gemm.h"
#include "experts_run.h"
#include "heads_run.h"
#include "recurrence_rows.h"
#include "recurrence_steps.h"
#include "recurrence_run.h"
#include "mixer_run.h"
#include "between_run.h"
#include "vocabulary_run.h"
#include "greedy_run.h"
}  // namespace
}  // namespace QUIRE_ISA

extern const LayerTable QUIRE_CAT(layers_, QUIRE_ISA);
const LayerTable QUIRE_CAT(layers_, QUIRE_ISA) = {
    QUIRE_ISA::experts,    QUIRE_ISA::route,       QUIRE_ISA::head_linear, QUIRE_ISA::conv,   QUIRE_ISA::selective_scan,
    QUIRE_ISA::ssd_scan,   QUIRE_ISA::delta_rule,  QUIRE_ISA::soften,      QUIRE_ISA::open_gate,   QUIRE_ISA::associate,
    QUIRE_ISA::open_heads, QUIRE_ISA::add,         QUIRE_ISA::add_wide,    QUIRE_ISA::scale,       QUIRE_ISA::weigh,  QUIRE_ISA::mask_tokens,
    QUIRE_ISA::sample,     QUIRE_ISA::logprobs,    QUIRE_ISA::most_likely,
};
}  // namespace quire
