// What module.cpp and the ISA levels agree on: the arguments of each kernel, and the table of kernels of one level.
// All strides count elements; the last dimension of every tensor is dense.
#pragma once
#include <cstdint>

namespace quire {

struct Team;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// How a cache keeps numbers: in the dtype of q; or as whole numbers with one scale for each token and head; or in eight
// floating bits, which saturate.
enum class Stored : int { plain = 0, int8 = 1, e4m3 = 2, e5m2 = 3 };

struct AttentionArgs {
  DType dtype;               // of q and out
  Stored stored;             // of both caches
  const void* q;             // [T, Hq, D]
  const void* k_cache;       // [num_blocks, block_size, Hk, D]
  const void* v_cache;       // [num_blocks, block_size, Hk, Dv]; may lie within k_cache
  const float* k_scales;     // [num_blocks, block_size, Hk], contiguous, or null: not int8
  const float* v_scales;     // the same
  void* out;                 // [T, Hq, Dv]
  const int32_t* block_table;      // [R, max_blocks]
  const int32_t* seq_lens;         // [R]
  const int32_t* query_start_loc;  // [R + 1]
  const float* sinks;              // [Hq], or null
  const float* alibi_slopes;       // [Hq], or null
  int64_t num_requests, num_heads, num_kv_heads, head_size, v_head_size, block_size;
  int64_t q_token_stride, q_head_stride, out_token_stride, out_head_stride;
  int64_t k_block_stride, k_slot_stride, k_head_stride;
  int64_t v_block_stride, v_slot_stride, v_head_stride;
  int64_t table_stride;
  int64_t window;  // 0: none; position p sees j with p - window < j <= p
  int64_t chunk;   // 0: none; position p sees j of its own chunk of this length
  float scale;
  float soft_cap;  // 0: none
  Team* team = nullptr;  // whose leader calls
};

struct CacheWriteArgs {
  DType dtype;  // of source
  Stored stored;
  int64_t element_size;    // of source and, where it is plain, of cache
  const void* source;      // [T, Hk, D]
  void* cache;             // [num_blocks, block_size, Hk, D]
  float* scales;           // [num_blocks, block_size, Hk], contiguous, or null: not int8
  const int64_t* slots;    // [T]
  int64_t num_tokens, num_heads, head_size, block_size;
  int64_t token_stride, head_stride, block_stride, slot_stride, cache_head_stride;
};

struct NormArgs {
  DType dtype;         // of x, residual, weight and out
  const void* x;       // [rows, n]
  void* residual;      // [rows, n], or null
  const void* weight;  // [n]
  void* out;           // [rows, n]
  int64_t rows, n, x_stride, residual_stride, out_stride;
  float eps;
};

enum class Gate : int { silu = 0, gelu_tanh = 1, gelu = 2 };

struct GateArgs {
  DType dtype;
  Gate gate;
  const void* x;  // [rows, 2n]: the half to activate, then the half to multiply with
  void* out;      // [rows, n]
  int64_t rows, n, x_stride, out_stride;
};

struct RotaryArgs {
  DType dtype;
  void* x;           // [T, heads, D], in place
  const float* cos;  // [T, F]
  const float* sin;  // [T, F]
  int64_t num_tokens, num_heads, num_pairs;  // num_pairs is F, at most D / 2
  int64_t token_stride, head_stride, cos_stride, sin_stride;
  bool is_interleaved;  // pairs are (2i, 2i + 1), else (i, i + F)
};

struct Table {
  const char* name;
  bool (*paged_attention)(const AttentionArgs&);  // false: out of memory
  void (*write_cache)(const CacheWriteArgs&);
  void (*rms_norm)(const NormArgs&);
  void (*gated_activation)(const GateArgs&);
  void (*rotary)(const RotaryArgs&);
};

}  // namespace quire
