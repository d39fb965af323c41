// Experts for Python, and mixtures of them in one call.
#pragma once
#include <nanobind/nanobind.h>

#include <vector>

#include "levels.h"
#include "linear_module.h"

namespace quire {

// The packed experts of one layer. Python keeps the weights alive.
class Experts {
 public:
  // Weights in floating point, one expert behind the other.
  Experts(int format, uintptr_t gate_up, uintptr_t gate_up_bias, uintptr_t down, uintptr_t down_bias, int64_t count,
          int64_t hidden_size, int64_t inner_size, int gate, float alpha, float limit);
  // Of codes: both layers' inputs are rounded, or neither's.
  Experts(const std::vector<const Linear*>& gate_up, const std::vector<const Linear*>& down, int gate, float alpha,
          float limit);

  void run(int dtype, uintptr_t x, uintptr_t shares, uintptr_t chosen, uintptr_t out, int64_t tokens, int64_t num_chosen,
           int64_t x_stride, int64_t out_stride, bool weighs_input) const;
  // What a call says of the weights.
  ExpertArgs arguments() const;
  int64_t count() const { return int64_t(gate_up_.size()); }
  int64_t hidden_size() const { return down_[0].num_outputs; }

 private:
  std::vector<LinearWeights> gate_up_, down_;
  ExpertGate gate_;
  float alpha_, limit_;
};

// A router, the experts that it chooses and the MLP that all tokens share: the kernels of their operators in their order.
class Mixture {
 public:
  // router float32 [E, H]; bias float32 [E] or 0; shared: null, or both, and perhaps its gate [1, H]. sizes: chosen, groups,
  // kept groups. flags: scores are sigmoids; shares sum to 1; a group's score is the sum of its two best; shares weigh
  // inputs, and experts are chosen by logits.
  Mixture(int dtype, const Linear& router, uintptr_t bias, const Experts& experts, const Linear* shared_gate_up,
          const Linear* shared_down, const Linear* shared_gate, int gate, const std::vector<int64_t>& sizes, float scale,
          const std::vector<bool>& flags);

  // x [rows, H] to out [rows, H], both contiguous, of the dtype. Throws std::bad_alloc.
  void run(const Level& level, const char* x, char* out, int64_t rows, Team* team) const;

 private:
  void share(const Level& level, const char* x, char* out, int64_t rows, Team* team) const;
  void choose(const Level& level, const char* x, float* shares, int64_t* chosen, int64_t rows, Team* team) const;

  DType dtype_;
  const Linear& router_;  // Python keeps it and what follows alive
  const float* bias_;
  const Experts& experts_;
  const Linear *shared_gate_up_, *shared_down_, *shared_gate_;
  Gate gate_;
  bool weighs_input_;
  RouteArgs routing_{};
};

// Adds them to the Python module.
void bind_experts(nanobind::module_& m);
}  // namespace quire
