// Whole layers in one call: the kernels of their operators in their order, so their bits are theirs. What it saves is what
// lies between two operators: the interpreter, and threads that fall asleep meanwhile.
// Shapes and dtypes are checked in Python (kernels_cpu/layer.py); what only the contents can tell, here.
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <utility>

#include "buffers.h"
#include "cached_attention.h"
#include "experts_module.h"
#include "mixing.h"

namespace nb = nanobind;

namespace quire {
namespace {

constexpr int64_t MLP_ROWS = 512;  // rows that go through the MLP together: what lies between stays in the caches

int pool_size() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

int team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

constexpr int64_t ROWS_OF_TEAM = 8;  // with more, products share their preparation through OpenMP

// `program(team)` by the leader while the other threads serve; without a team if there are no others or none is wanted.
template <class Program>
void with_team(bool is_wanted, const Program& program) {
  const int threads = is_wanted ? pool_size() : 1;
  if (threads < 2) return program(nullptr);
  Team team{};
  bool has_memory = true;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    team.threads = team_size();
    const int own = current_thread();
    if (own) {
      serve(team, own);
    } else {
      try {
        program(team.threads > 1 ? &team : nullptr);
      } catch (const std::bad_alloc&) {
        has_memory = false;
      }
      dismiss(team);
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

// What tells the tokens of one another, then an MLP or a mixture of experts, or nothing, around a residual.
class Layer {
 public:
  // norms: of what the mixings give, before the MLP, after the MLP, of what follows; 0 where there is none.
  // gate_up, down: null where `mixture` takes their place, or nothing does. The residual is float32 if it is wide.
  Layer(int dtype, int64_t element_size, int64_t hidden, std::vector<const Mixing*> mixings, const Linear* gate_up,
        const Linear* down, const Mixture* mixture, const Sizes& norms, int gate, float eps,
        bool is_residual_wide)
      : dtype_(DType(dtype)), element_size_(element_size), hidden_(hidden), mixings_(std::move(mixings)), gate_up_(gate_up),
        down_(down), mixture_(mixture), norms_(norms), gate_(Gate(gate)), eps_(eps),
        is_residual_wide_(is_residual_wide) {
    if (norms.size() != 4 || mixings_.empty()) throw std::invalid_argument("four norms, and a mixing");
    if (!gate_up != !down || (mixture && gate_up)) throw std::invalid_argument("one MLP, or one mixture, or neither");
    if (is_residual_wide && (gate_up || mixture)) throw std::invalid_argument("a wide residual is for mixings alone");
  }

  const std::vector<const Mixing*>& mixings() const { return mixings_; }

  // x [T, H] in, and out: normalised for what follows; residual [T, H] in place. parts, angles: of each mixing. `next`: who
  // follows, or null.
  void run(const Turn& turn, const std::vector<const StepPart*>& parts, const std::vector<Angles>& angles, char* x,
           char* residual, const Layer* next) const {
    mix(turn, parts, angles, x, residual);
    if (mixture_) follow_mixture(turn, x, residual);
    else if (gate_up_) follow(turn, x, residual);
    if (next) announce(turn.team, ahead_of(next->mixings_[0]->first()));
  }

 private:
  void norm(const Turn& turn, const char* in, char* sum, size_t index, char* out, int64_t count) const {
    const void* weight = at<const void>(norms_[index]);
    if (weight)
      turn.level.kernels->rms_norm({dtype_, in, sum, weight, out, count, hidden_, hidden_, sum ? hidden_ : 0, hidden_, eps_});
  }

  // From x to the normalised input of the MLP, which takes the place of x.
  void mix(const Turn& turn, const std::vector<const StepPart*>& parts, const std::vector<Angles>& angles, char* x,
           char* residual) const {
    const int64_t bytes = turn.rows * hidden_ * element_size_;
    const bool has_more = mixings_.size() > 1;
    Buffers buffers(Buffers::padded(bytes) * (has_more ? 2 : 1));
    char *sum = buffers.take(bytes), *one = has_more ? buffers.take(bytes) : nullptr;
    for (size_t i = 0; i < mixings_.size(); ++i) {
      mixings_[i]->run(turn, *parts[i], angles[i], x, i ? one : sum);
      if (i) turn.level.layers->add({dtype_, one, sum, turn.rows * hidden_});
      else if (has_more) announce(turn.team, ahead_of(mixings_[1]->first()));
    }
    if (gate_up_) announce(turn.team, ahead_of(gate_up_->weights()));
    norm(turn, sum, nullptr, 0, sum, turn.rows);
    const size_t next = gate_up_ || mixture_ ? 1 : 3;
    if (!is_residual_wide_) return norm(turn, sum, residual, next, x, turn.rows);
    turn.level.layers->add_wide({dtype_, sum, reinterpret_cast<float*>(residual), sum, turn.rows * hidden_});
    norm(turn, sum, nullptr, next, x, turn.rows);
  }

  // The MLP some rows at a time: a row's bits do not depend on its company.
  void follow(const Turn& turn, char* x, char* residual) const {
    const int64_t inner = down_->weights().num_inputs, size = element_size_, most = std::min(turn.rows, MLP_ROWS);
    Buffers buffers(Buffers::padded(most * 2 * inner * size) + Buffers::padded(most * inner * size) +
                    Buffers::padded(most * hidden_ * size));
    char *both = buffers.take(most * 2 * inner * size), *gated = buffers.take(most * inner * size);
    char* sum = buffers.take(most * hidden_ * size);
    for (int64_t row = 0; row < turn.rows; row += most) {
      const Turn part{turn.level, std::min(turn.rows - row, most), turn.team};
      const int64_t offset = row * hidden_ * size;
      part.multiply(*gate_up_, dtype_, x + offset, both);
      announce(turn.team, ahead_of(down_->weights()));
      turn.level.kernels->gated_activation({dtype_, gate_, both, gated, part.rows, inner, 2 * inner, inner});
      part.multiply(*down_, dtype_, gated, sum);
      norm(turn, sum, nullptr, 2, sum, part.rows);
      norm(turn, sum, residual + offset, 3, x + offset, part.rows);
    }
  }

  void follow_mixture(const Turn& turn, char* x, char* residual) const {
    const int64_t bytes = turn.rows * hidden_ * element_size_;
    Buffers buffers(Buffers::padded(bytes));
    char* sum = buffers.take(bytes);
    mixture_->run(turn.level, x, sum, turn.rows, turn.team);
    norm(turn, sum, nullptr, 2, sum, turn.rows);
    norm(turn, sum, residual, 3, x, turn.rows);
  }

  DType dtype_;
  int64_t element_size_, hidden_;
  std::vector<const Mixing*> mixings_;  // Python keeps them and what follows alive
  const Linear *gate_up_, *down_;
  const Mixture* mixture_;
  Sizes norms_;
  Gate gate_;
  float eps_;
  bool is_residual_wide_;
};

// Layers one after the other, in one call: the threads stay awake from the first to the last.
class LayerChain {
 public:
  // groups, ropes: of each mixing of each layer, which of the parts and of the angles are its own.
  LayerChain(std::vector<const Layer*> layers, std::vector<std::vector<size_t>> groups,
             std::vector<std::vector<size_t>> ropes)
      : layers_(std::move(layers)), groups_(std::move(groups)), ropes_(std::move(ropes)) {
    bool fits = groups_.size() == layers_.size() && ropes_.size() == layers_.size();
    for (size_t i = 0; fits && i < layers_.size(); ++i)
      fits = groups_[i].size() == layers_[i]->mixings().size() && ropes_[i].size() == groups_[i].size();
    if (!fits) throw std::invalid_argument("each mixing has a group and a rope");
  }

  // angles: for each rope the addresses of cosines and sines, and the strides of their rows.
  void run(const std::vector<const StepPart*>& parts, uintptr_t x, uintptr_t residual, const std::vector<Sizes>& angles) const {
    std::vector<Angles> rotations;
    for (const auto& one : angles) rotations.push_back({at<const float>(one.at(0)), at<const float>(one.at(1)), one.at(2), one.at(3)});
    std::vector<std::vector<const StepPart*>> parts_of(layers_.size());
    std::vector<std::vector<Angles>> angles_of(layers_.size());
    for (size_t i = 0; i < layers_.size(); ++i)
      for (size_t k = 0; k < groups_[i].size(); ++k) {
        parts_of[i].push_back(parts.at(groups_[i][k]));
        angles_of[i].push_back(rotations.at(ropes_[i][k]));
        layers_[i]->mixings()[k]->check(*parts_of[i][k]);
      }
    if (layers_.empty()) return;
    const int64_t rows = parts_of[0][0]->num_tokens;
    for (const StepPart* part : parts)
      if (part->num_tokens != rows) throw std::invalid_argument("the parts of a step differ in their number of tokens");
    nb::gil_scoped_release released;
    with_team(rows <= ROWS_OF_TEAM, [&](Team* team) {
      const Turn turn{chosen_level(), rows, team};
      for (size_t i = 0; i < layers_.size(); ++i)
        layers_[i]->run(turn, parts_of[i], angles_of[i], at<char>(int64_t(x)), at<char>(int64_t(residual)),
                        i + 1 < layers_.size() ? layers_[i + 1] : nullptr);
    });
  }

 private:
  std::vector<const Layer*> layers_;  // Python keeps them alive
  std::vector<std::vector<size_t>> groups_, ropes_;
};

}  // namespace

void bind_layers_in_one_call(nb::module_& m) {
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<int, int64_t, int64_t, std::vector<const Mixing*>, const Linear*, const Linear*, const Mixture*,
                    const Sizes&, int, float, bool>(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>());
  nb::class_<LayerChain>(m, "LayerChain")
      .def(nb::init<std::vector<const Layer*>, std::vector<std::vector<size_t>>, std::vector<std::vector<size_t>>>())
      .def("run", &LayerChain::run);
}

void bind_mixing(nb::module_& m) {
  nb::class_<StepPart>(m, "StepPart");
  nb::class_<Step, StepPart>(m, "Step").def(nb::init<int64_t, int64_t, int64_t, int64_t, const Sizes&>());
  nb::class_<Rounds, StepPart>(m, "Rounds").def(nb::init<const std::vector<Sizes>&, int64_t>());
  nb::class_<Mixing>(m, "Mixing");
  nb::class_<CachedMixing, Mixing>(m, "CachedMixing").def("bind_cache", &CachedMixing::bind_cache);
  nb::class_<StateMixing, Mixing>(m, "StateMixing")
      .def("bind_pages", &StateMixing::bind_pages)
      .def("run", &StateMixing::run_alone);
}

}  // namespace quire
