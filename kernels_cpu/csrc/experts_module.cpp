// Experts for Python, and mixtures of them in one call. Shapes and dtypes are checked in Python; what only the contents
// can tell, here.
#include "experts_module.h"

#include <nanobind/stl/vector.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "buffers.h"
#include "linear_pack.h"

namespace nb = nanobind;

namespace quire {
namespace {

constexpr int64_t ROWS = 512;  // that go through the shared MLP together: what lies between stays in the caches

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// The weights of E equal layers, one behind the other; biases [E, panels * PANEL] or 0.
std::vector<LinearWeights> layers_of(int format, uintptr_t lanes, uintptr_t bias, int64_t count, int64_t num_outputs,
                                     int64_t num_inputs) {
  const int64_t size = num_lanes(Format(format), num_outputs, num_inputs);
  const int64_t padded = (num_outputs + PANEL - 1) / PANEL * PANEL;
  std::vector<LinearWeights> layers(static_cast<size_t>(count));
  for (int64_t e = 0; e < count; ++e) {
    LinearWeights& w = layers[size_t(e)];
    w.format = Format(format), w.rounding = Rounding::none;
    w.lanes = at<const uint32_t>(lanes) + e * size;
    if (bias) w.bias = at<const float>(bias) + e * padded;
    set_sizes(w, num_outputs, num_inputs, 0);
  }
  return layers;
}

// The weights of E layers of codes, which differ in nothing else.
std::vector<LinearWeights> layers_of(const std::vector<const Linear*>& linears) {
  std::vector<LinearWeights> layers;
  for (const Linear* linear : linears) layers.push_back(linear->weights());
  if (layers.empty()) throw std::invalid_argument("no experts");
  const LinearWeights& first = layers[0];
  for (const LinearWeights& w : layers)
    if (w.format != first.format || w.rounding != first.rounding || w.num_outputs != first.num_outputs ||
        w.num_inputs != first.num_inputs || w.num_groups != first.num_groups)
      throw std::invalid_argument("experts of one layer have one form");
  return layers;
}

float float_of(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

void require_memory(bool has_memory) {
  if (!has_memory) throw std::bad_alloc();
}

}  // namespace

Experts::Experts(int format, uintptr_t gate_up, uintptr_t gate_up_bias, uintptr_t down, uintptr_t down_bias,
                 int64_t count, int64_t hidden_size, int64_t inner_size, int gate, float alpha, float limit)
    : gate_up_(layers_of(format, gate_up, gate_up_bias, count, 2 * inner_size, hidden_size)),
      down_(layers_of(format, down, down_bias, count, hidden_size, inner_size)),
      gate_(ExpertGate(gate)), alpha_(alpha), limit_(limit) {}

Experts::Experts(const std::vector<const Linear*>& gate_up, const std::vector<const Linear*>& down, int gate, float alpha,
                 float limit)
    : gate_up_(layers_of(gate_up)), down_(layers_of(down)), gate_(ExpertGate(gate)), alpha_(alpha), limit_(limit) {
  const LinearWeights &up = gate_up_[0], &back = down_[0];
  const bool is_rounded = up.rounding != Rounding::none;
  if (gate_up_.size() != down_.size() || up.num_outputs != 2 * back.num_inputs || up.num_inputs != back.num_outputs ||
      is_rounded != (back.rounding != Rounding::none) || !up.scales || !back.scales)
    throw std::invalid_argument("experts' layers do not fit each other");
}

ExpertArgs Experts::arguments() const {
  ExpertArgs a{};
  a.gate_up = gate_up_.data(), a.down = down_.data(), a.num_experts = count();
  a.gate = gate_, a.alpha = alpha_, a.limit = limit_;
  return a;
}

void Experts::run(int dtype, uintptr_t x, uintptr_t shares, uintptr_t chosen, uintptr_t out, int64_t tokens,
                  int64_t num_chosen, int64_t x_stride, int64_t out_stride, bool weighs_input) const {
  ExpertArgs a = arguments();
  a.dtype = DType(dtype), a.x = at<const void>(x), a.shares = at<const float>(shares);
  a.chosen = at<const int64_t>(chosen), a.out = at<void>(out);
  a.tokens = tokens, a.num_chosen = num_chosen, a.x_stride = x_stride, a.out_stride = out_stride;
  a.weighs_input = weighs_input;
  for (int64_t i = 0; i < tokens * num_chosen; ++i)
    if (a.chosen[i] < 0 || a.chosen[i] >= a.num_experts)
      throw std::out_of_range("expert " + std::to_string(a.chosen[i]) + " was chosen; there are " +
                              std::to_string(a.num_experts));
  bool has_memory;
  {
    nb::gil_scoped_release released;
    has_memory = chosen_level().layers->experts(a);
  }
  require_memory(has_memory);
}

Mixture::Mixture(int dtype, const Linear& router, uintptr_t bias, const Experts& experts, const Linear* shared_gate_up,
                 const Linear* shared_down, const Linear* shared_gate, int gate, const std::vector<int64_t>& sizes,
                 float scale, const std::vector<bool>& flags)
    : dtype_(DType(dtype)), router_(router), bias_(at<const float>(bias)), experts_(experts),
      shared_gate_up_(shared_gate_up), shared_down_(shared_down), shared_gate_(shared_gate), gate_(Gate(gate)) {
  if (sizes.size() != 3 || flags.size() != 4) throw std::invalid_argument("three sizes and four flags");
  if (dtype_ != DType::f32 && dtype_ != DType::bf16) throw std::invalid_argument("rows are float32 or bfloat16");
  const LinearWeights& w = router.weights();
  if (w.num_outputs != experts.count() || w.num_inputs != experts.hidden_size() || w.format != Format::f32)
    throw std::invalid_argument("the router does not fit the experts");
  routing_.bias = bias_, routing_.num_experts = routing_.logits_stride = experts.count();
  routing_.num_chosen = sizes[0], routing_.num_groups = sizes[1], routing_.num_kept_groups = sizes[2];
  routing_.scale = scale, routing_.is_sigmoid = flags[0], routing_.is_renormalised = flags[1];
  routing_.adds_two_best = flags[2], routing_.is_by_logits = weighs_input_ = flags[3];
  if (sizes[0] < 1 || sizes[0] > experts.count() || sizes[1] < 1 || experts.count() % sizes[1] || sizes[2] < 1 ||
      sizes[2] > sizes[1] || sizes[0] > experts.count() / sizes[1] * sizes[2])
    throw std::invalid_argument("so many experts of such groups cannot be chosen");
}

// The experts of some rows and their shares, by logits in float32.
void Mixture::choose(const Level& level, const char* x, float* shares, int64_t* chosen, int64_t rows, Team* team) const {
  const int64_t hidden = experts_.hidden_size(), count = experts_.count();
  Buffers buffers(Buffers::padded(rows * hidden * 4) + Buffers::padded(rows * count * 4));
  float* wide = reinterpret_cast<float*>(buffers.take(rows * hidden * 4));
  float* logits = reinterpret_cast<float*>(buffers.take(rows * count * 4));
  const uint16_t* narrow = reinterpret_cast<const uint16_t*>(x);
  if (dtype_ == DType::f32) std::memcpy(wide, x, size_t(rows * hidden) * 4);
  else
    for (int64_t i = 0; i < rows * hidden; ++i) wide[i] = float_of(narrow[i]);
  require_memory(level.linear->multiply({&router_.weights(), DType::f32, wide, logits, rows, hidden, count, team}));
  RouteArgs a = routing_;
  a.logits = logits, a.weights = shares, a.ids = chosen, a.tokens = rows;
  require_memory(level.layers->route(a));
}

// Adds what the shared MLP makes of some rows.
void Mixture::share(const Level& level, const char* x, char* out, int64_t rows, Team* team) const {
  const int64_t size = dtype_ == DType::f32 ? 4 : 2, hidden = experts_.hidden_size();
  const LinearWeights &up = shared_gate_up_->weights(), &down = shared_down_->weights();
  const int64_t inner = down.num_inputs;
  Buffers buffers(Buffers::padded(rows * 2 * inner * size) + Buffers::padded(rows * inner * size) +
                  Buffers::padded(rows * hidden * size));
  char *both = buffers.take(rows * 2 * inner * size), *gated = buffers.take(rows * inner * size);
  char* sum = buffers.take(rows * hidden * size);
  require_memory(level.linear->multiply({&up, dtype_, x, both, rows, hidden, 2 * inner, team}));
  announce(team, ahead_of(down));
  level.kernels->gated_activation({dtype_, gate_, both, gated, rows, inner, 2 * inner, inner});
  require_memory(level.linear->multiply({&down, dtype_, gated, sum, rows, inner, hidden, team}));
  if (shared_gate_) {
    Buffers gates(Buffers::padded(rows * size));
    char* gate = gates.take(rows * size);
    require_memory(level.linear->multiply({&shared_gate_->weights(), dtype_, x, gate, rows, hidden, 1, team}));
    level.layers->weigh({dtype_, sum, gate, rows, hidden, 1, true});
  }
  level.layers->add({dtype_, sum, out, rows * hidden});
}

void Mixture::run(const Level& level, const char* x, char* out, int64_t rows, Team* team) const {
  const int64_t size = dtype_ == DType::f32 ? 4 : 2, hidden = experts_.hidden_size(), k = routing_.num_chosen;
  Buffers buffers(Buffers::padded(rows * k * 4) + Buffers::padded(rows * k * 8));
  float* shares = reinterpret_cast<float*>(buffers.take(rows * k * 4));
  int64_t* chosen = reinterpret_cast<int64_t*>(buffers.take(rows * k * 8));
  for (int64_t row = 0; row < rows; row += ROWS) {
    const int64_t count = rows - row < ROWS ? rows - row : ROWS;
    choose(level, x + row * hidden * size, shares + row * k, chosen + row * k, count, team);
  }
  ExpertArgs a = experts_.arguments();
  a.dtype = dtype_, a.x = x, a.shares = shares, a.chosen = chosen, a.out = out;
  a.tokens = rows, a.num_chosen = k, a.x_stride = a.out_stride = hidden;
  a.weighs_input = weighs_input_;
  a.team = team;
  require_memory(level.layers->experts(a));
  for (int64_t row = 0; shared_down_ && row < rows; row += ROWS) {
    const int64_t count = rows - row < ROWS ? rows - row : ROWS;
    share(level, x + row * hidden * size, out + row * hidden * size, count, team);
  }
}

void bind_experts(nb::module_& m) {
  nb::class_<Experts>(m, "Experts")
      .def(nb::init<int, uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int, float, float>())
      .def(nb::init<const std::vector<const Linear*>&, const std::vector<const Linear*>&, int, float, float>())
      .def("run", &Experts::run);
  nb::class_<Mixture>(m, "Mixture")
      .def(nb::init<int, const Linear&, uintptr_t, const Experts&, const Linear*, const Linear*, const Linear*, int,
                    const std::vector<int64_t>&, float, const std::vector<bool>&>(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
           nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>());
}

}  // namespace quire
