// The Python module: addresses and numbers in, one kernel called, nothing of torch's ABI.
// Shapes, dtypes and strides are checked in Python (kernels_cpu/checks.py); what only the contents can tell, here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "batch_checks.h"
#include "experts_module.h"
#include "layers_module.h"
#include "levels.h"
#include "linear_module.h"
#include "mixing.h"
#include "quantize_module.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nb = nanobind;

namespace quire {
template <class T>
static T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Sizes = std::vector<int64_t>;

// sizes: requests, heads, kv heads, head size, v head size, block size, tokens, blocks, columns of the block table;
// strides: q (token, head), out (token, head), k (block, slot, head), v (block, slot, head), block table (row).
static void paged_attention(int dtype, int stored, uintptr_t q, uintptr_t k_cache, uintptr_t v_cache,
                            uintptr_t k_scales, uintptr_t v_scales, uintptr_t out,
                            uintptr_t block_table, uintptr_t seq_lens, uintptr_t query_start_loc, uintptr_t sinks,
                            uintptr_t alibi_slopes, const Sizes& sizes, const Sizes& strides, float scale,
                            int64_t window, int64_t chunk, float soft_cap) {
  if (sizes.size() != 9 || strides.size() != 11) throw std::invalid_argument("nine sizes and eleven strides");
  AttentionArgs a{};
  a.dtype = DType(dtype), a.stored = Stored(stored);
  a.k_scales = at<const float>(k_scales), a.v_scales = at<const float>(v_scales);
  a.q = at<const void>(q), a.k_cache = at<const void>(k_cache), a.v_cache = at<const void>(v_cache);
  a.out = at<void>(out);
  a.block_table = at<const int32_t>(block_table), a.seq_lens = at<const int32_t>(seq_lens);
  a.query_start_loc = at<const int32_t>(query_start_loc);
  a.sinks = at<const float>(sinks), a.alibi_slopes = at<const float>(alibi_slopes);
  a.num_requests = sizes[0], a.num_heads = sizes[1], a.num_kv_heads = sizes[2];
  a.head_size = sizes[3], a.v_head_size = sizes[4], a.block_size = sizes[5];
  a.q_token_stride = strides[0], a.q_head_stride = strides[1];
  a.out_token_stride = strides[2], a.out_head_stride = strides[3];
  a.k_block_stride = strides[4], a.k_slot_stride = strides[5], a.k_head_stride = strides[6];
  a.v_block_stride = strides[7], a.v_slot_stride = strides[8], a.v_head_stride = strides[9];
  a.table_stride = strides[10];
  a.scale = scale, a.window = window, a.chunk = chunk, a.soft_cap = soft_cap;
  check_batch(a, sizes[6], sizes[7], sizes[8]);
  bool has_memory;
  {
    nb::gil_scoped_release released;
    has_memory = chosen_level().kernels->paged_attention(a);
  }
  if (!has_memory) throw std::bad_alloc();
}

// sizes: tokens, heads, head size, block size, blocks; strides: source (token, head), cache (block, slot, head).
static void write_cache(int dtype, int stored, int64_t element_size, uintptr_t source, uintptr_t cache,
                        uintptr_t scales, uintptr_t slots, const Sizes& sizes, const Sizes& strides) {
  if (sizes.size() != 5 || strides.size() != 5) throw std::invalid_argument("five sizes and five strides");
  CacheWriteArgs a{};
  a.dtype = DType(dtype), a.stored = Stored(stored), a.scales = at<float>(scales);
  a.element_size = element_size;
  a.source = at<const void>(source), a.cache = at<void>(cache), a.slots = at<const int64_t>(slots);
  a.num_tokens = sizes[0], a.num_heads = sizes[1], a.head_size = sizes[2], a.block_size = sizes[3];
  a.token_stride = strides[0], a.head_stride = strides[1];
  a.block_stride = strides[2], a.slot_stride = strides[3], a.cache_head_stride = strides[4];
  check_slots(a.slots, a.num_tokens, sizes[3] * sizes[4]);
  nb::gil_scoped_release released;
  chosen_level().kernels->write_cache(a);
}

static void rms_norm(int dtype, uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, int64_t rows,
                     int64_t n, int64_t x_stride, int64_t residual_stride, int64_t out_stride, float eps) {
  const NormArgs a{DType(dtype), at<const void>(x), at<void>(residual), at<const void>(weight), at<void>(out),
                   rows,         n,                 x_stride,           residual_stride,        out_stride,
                   eps};
  nb::gil_scoped_release released;
  chosen_level().kernels->rms_norm(a);
}

static void gated_activation(int dtype, int gate, uintptr_t x, uintptr_t out, int64_t rows, int64_t n,
                             int64_t x_stride, int64_t out_stride) {
  const GateArgs a{DType(dtype), Gate(gate), at<const void>(x), at<void>(out), rows, n, x_stride, out_stride};
  nb::gil_scoped_release released;
  chosen_level().kernels->gated_activation(a);
}

static void rotary(int dtype, uintptr_t x, uintptr_t cos, uintptr_t sin, int64_t num_tokens, int64_t num_heads,
                   int64_t num_pairs, int64_t token_stride, int64_t head_stride, int64_t cos_stride,
                   int64_t sin_stride, bool is_interleaved) {
  const RotaryArgs a{DType(dtype), at<void>(x),  at<const float>(cos), at<const float>(sin),
                     num_tokens,   num_heads,    num_pairs,            token_stride,
                     head_stride,  cos_stride,   sin_stride,           is_interleaved};
  nb::gil_scoped_release released;
  chosen_level().kernels->rotary(a);
}

// Binds thread i of the pool to cpus[i % n], the caller's thread among them. False: this system cannot, or refused one.
static bool pin_threads(const std::vector<int64_t>& cpus) {
#if defined(__linux__) && defined(_OPENMP)
  if (cpus.empty()) return false;
  bool done = true;
#pragma omp parallel reduction(&& : done)
  {
    cpu_set_t mine;
    CPU_ZERO(&mine);
    CPU_SET(size_t(cpus[size_t(omp_get_thread_num()) % cpus.size()]), &mine);
    done = sched_setaffinity(0, sizeof mine, &mine) == 0;  // 0: the calling thread
  }
  return done;
#else
  (void)cpus;
  return false;
#endif
}
}  // namespace quire

NB_MODULE(_cpu, m) {
  m.def("isa", [] { return std::string(quire::chosen_level().name); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const quire::Level& level : quire::available_levels()) names.emplace_back(level.name);
    return names;
  });
  m.def("use_isa", &quire::choose_level);
  m.def("pin_threads", &quire::pin_threads);
  m.def("paged_attention", &quire::paged_attention);
  m.def("write_cache", &quire::write_cache);
  m.def("rms_norm", &quire::rms_norm);
  m.def("gated_activation", &quire::gated_activation);
  m.def("rotary", &quire::rotary);
  quire::bind_linear(m);
  quire::bind_layers(m);
  quire::bind_experts(m);
  quire::bind_mixing(m);
  quire::bind_attention(m);
  quire::bind_latent(m);
  quire::bind_mixer(m);
  quire::bind_delta(m);
  quire::bind_layers_in_one_call(m);
  quire::bind_quantize(m);
}
