// The kernels beside linear layers and attention: experts, recurrences, and what is done over a whole vocabulary.
// All strides count elements; the last dimension of every tensor is dense.
#pragma once
#include <cstdint>

#include "linear.h"

namespace quire {

// --- experts ---------------------------------------------------------------------------------------------------------

enum class ExpertGate : int { silu = 0, gelu_tanh = 1, gelu = 2, clamped_swiglu = 3 };

struct ExpertArgs {
  const LinearWeights* gate_up;  // [E], each [2I, H]
  const LinearWeights* down;     // [E], each [H, I]
  int64_t num_experts;
  ExpertGate gate;
  float alpha, limit;  // of clamped_swiglu
  DType dtype;         // of x and out
  const void* x;       // [T, H]
  const float* shares;    // [T, k]
  const int64_t* chosen;  // [T, k], in [0, E)
  void* out;              // [T, H]
  int64_t tokens, num_chosen, x_stride, out_stride;
  bool weighs_input;
  Team* team = nullptr;  // whose leader calls
};

struct RouteArgs {
  const float* logits;  // [T, E]
  const float* bias;    // [E], or null: added to the scores for the choice alone
  float* weights;       // [T, k]
  int64_t* ids;         // [T, k]
  int64_t tokens, num_experts, num_chosen, num_groups, num_kept_groups, logits_stride;
  float scale;
  bool is_sigmoid, is_renormalised, adds_two_best;  // the last: a group's score is the sum of its two best
  bool is_by_logits = false;  // the largest are chosen, by their logits, not by their scores
};

struct HeadLinearArgs {
  DType dtype;         // of x, weight and out
  const void* x;       // [T, M, K]
  const void* weight;  // [M, N, K]
  void* out;           // [T, M, N]
  int64_t tokens, heads, num_outputs, num_inputs;
  int64_t x_token_stride, x_head_stride, weight_head_stride;
  int64_t weight_row_stride, weight_column_stride;  // of outputs and of inputs; one of them is 1
  int64_t out_token_stride, out_head_stride;
  Team* team = nullptr;  // whose leader calls
};

// --- recurrences -----------------------------------------------------------------------------------------------------

struct Rows {
  const int32_t *starts, *ends;  // [S]: sequence s owns rows [starts[s], ends[s])
  int64_t num_sequences;
  const int64_t* sources;  // [S]: whose state it starts from, negative: from zeros; null: its own
  const int64_t* targets;  // [S]: whose state it leaves; null: its own
  int64_t state_stride;    // between states, each dense in itself
};

struct ConvArgs {
  DType dtype;         // of everything
  const void* x;       // [T, C]
  const void* weight;  // [C, taps]
  const void* bias;    // [C], or null
  void* states;        // [n, C, taps - 1]; `rows` says which
  void* out;           // [T, C], contiguous
  Rows rows;
  int64_t channels, taps, x_stride;
  bool has_silu;
  Team* team = nullptr;  // whose leader calls; of what follows too
};

// A matrix of the step whose dtype may differ from x's: [T, groups, size], the last two dense.
struct Operand {
  DType dtype;
  const void* data;
  int64_t stride;  // of a token
};

struct SelectiveArgs {
  DType dtype;      // of x and out
  const void* x;    // [T, C]
  const float* dt;  // [T, C]
  const float* a;   // [C, N]
  Operand b, c;     // [T, N]
  const float* d;   // [C], or null
  float* states;    // [n, C, N]; `rows` says which
  void* out;        // [T, C]
  Rows rows;
  int64_t channels, size, x_stride, dt_stride;
  Team* team = nullptr;
};

struct SsdArgs {
  DType dtype;      // of x and out
  const void* x;    // [T, M, P]
  const float* dt;  // [T, M]
  const float* a;   // [M]
  Operand b, c;     // [T, G, N]
  const float* d;   // [M], or null
  float* states;    // [n, M, P, N]; `rows` says which
  void* out;        // [T, M, P]
  Rows rows;
  int64_t heads, channels, groups, size, x_stride, dt_stride;
  Team* team = nullptr;
};

struct DeltaArgs {
  DType dtype;         // of v and out
  const void* v;       // [T, M, Dv]
  Operand q, k;        // [T, G, D]
  const float* decay;  // [T, M]
  const float* beta;   // [T, M]
  float* states;       // [n, M, D, Dv]; `rows` says which
  void* out;           // [T, M, Dv]
  Rows rows;
  int64_t heads, v_size, groups, size, v_stride, decay_stride, beta_stride;
  Team* team = nullptr;
};

struct SoftenArgs {
  DType dtype;        // of x
  const void* x;      // [rows, n]
  const float* bias;  // [n]
  float* out;         // [rows, n], contiguous: log(1 + exp(x + bias))
  int64_t rows, n, x_stride;
  Team* team = nullptr;
};

struct OpenArgs {
  DType dtype;         // of y, gate and weight
  void* y;             // [rows, n], contiguous; in place: y silu(gate), with an RMS norm of each group if there is a weight
  const void* gate;    // [rows, n]
  const void* weight;  // [n], or null: no norm
  int64_t rows, n, groups, gate_stride;
  float eps;
  bool is_norm_first;  // the norm is of y alone, not of y silu(gate)
  Team* team = nullptr;
};

// What a delta rule is given, from what was projected and convolved.
struct AssociateArgs {
  DType dtype;                // of mixed, betas and steps
  const void* mixed;          // [rows, 2GD + M Dv], contiguous: queries, keys and values
  const void *betas, *steps;  // [rows, M]
  const float *a, *bias;      // [M]
  float *q, *k;               // [rows, G, D]: heads of length 1, queries times D^-1/2
  float* v;                   // [rows, M, Dv]
  float *decay, *beta;        // [rows, M]: a log(1 + exp(steps + bias)), 1 / (1 + exp(-betas))
  int64_t rows, groups, size, heads, v_size, stride;
  float eps;  // added to the squared length
  Team* team = nullptr;
};

struct OpenHeadsArgs {
  DType dtype;          // of gate and out
  const float* y;       // [rows, M, Dv]
  const void* gate;     // [rows, M, Dv]
  const float* weight;  // [Dv]
  void* out;            // [rows, M, Dv]: the RMS norm of each head of y times silu(gate)
  int64_t rows, heads, v_size, gate_stride;
  float eps;
  Team* team = nullptr;
};

// --- what stands between the parts of a layer ------------------------------------------------------------------------

struct AddArgs {
  DType dtype;
  const void* x;  // [n]
  void* sum;      // [n], in place
  int64_t n;
};

// A residual that is kept wider than what is added to it.
struct WidenArgs {
  DType dtype;
  const void* x;  // [n]
  float* sum;     // [n], in place
  void* out;      // [n]: the sum, rounded to the dtype
  int64_t n;
};

struct ScaleArgs {
  DType dtype;
  void* x;              // [rows, n], in place
  const float* factor;  // [rows]
  int64_t rows, n, x_stride, factor_stride;
};

struct WeighArgs {
  DType dtype;
  void* x;           // [rows, n], contiguous, in place: times 1 / (1 + exp(-gate)), rounded to the dtype
  const void* gate;  // [rows, n], or one of each row
  int64_t rows, n, gate_stride;
  bool is_of_row;
};

// --- vocabulary ------------------------------------------------------------------------------------------------------

struct MaskArgs {
  float* logits;        // [R, V]
  const int64_t* rows;  // [K]
  const uint32_t* mask;  // [K, words]
  int64_t num_rows, vocab_size, stride, mask_stride;
};

struct GreedyArgs {
  DType dtype;
  const void* logits;  // [R, V]
  int64_t* out;        // [R]
  bool* is_broken;     // [R]
  int64_t num_rows, vocab_size, stride;
};

struct SampleArgs {
  const float* logits;       // [R, V]
  const float* temperature;  // [R]; 0: the most likely
  const int64_t* top_k;      // [R]
  const float* top_p;        // [R]
  const float* min_p;        // [R]
  const float* uniform;      // [R]
  int64_t* out;              // [R]
  int64_t num_rows, vocab_size, stride;
  bool is_all_greedy, needs_filter;
};

struct LogprobArgs {
  const float* logits;    // [R, V]
  const int64_t* chosen;  // [R]
  float* selected;        // [R]
  int64_t* ranks;         // [R]
  int64_t* top_ids;       // [R, n]
  float* top_logprobs;    // [R, n]
  int64_t num_rows, vocab_size, stride, num_top;
};

struct LayerTable {  // false: out of memory
  bool (*experts)(const ExpertArgs&);
  bool (*route)(const RouteArgs&);
  void (*head_linear)(const HeadLinearArgs&);
  bool (*conv)(const ConvArgs&);
  bool (*selective_scan)(const SelectiveArgs&);
  bool (*ssd_scan)(const SsdArgs&);
  bool (*delta_rule)(const DeltaArgs&);
  void (*soften)(const SoftenArgs&);
  void (*open_gate)(const OpenArgs&);
  void (*associate)(const AssociateArgs&);
  void (*open_heads)(const OpenHeadsArgs&);
  void (*add)(const AddArgs&);
  void (*add_wide)(const WidenArgs&);
  void (*scale)(const ScaleArgs&);
  void (*weigh)(const WeighArgs&);
  void (*mask)(const MaskArgs&);
  bool (*sample)(const SampleArgs&);
  bool (*logprobs)(const LogprobArgs&);
  void (*most_likely)(const GreedyArgs&);
};

}  // namespace quire
