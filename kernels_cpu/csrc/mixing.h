// What the parts of a layer agree on that tell the tokens of a text of one another: attention, and mixers with states.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <new>
#include <stdexcept>
#include <vector>

#include "batch_checks.h"
#include "levels.h"
#include "linear_module.h"
#include "mixer_pieces.h"

namespace quire {

// What one step asks of every mixing of a group. Python keeps its tensors alive.
class StepPart {
 public:
  virtual ~StepPart() = default;
  int64_t num_tokens = 0;
};

// Whose rows are whose, and where keys go.
class Step : public StepPart {
 public:
  // Addresses; sizes: requests, tokens, columns and row stride of the block table.
  Step(int64_t query_start_loc, int64_t seq_lens, int64_t block_table, int64_t slots, const Sizes& sizes);

  // Raises what the contents would break in a cache of so many blocks.
  void check(const AttentionArgs& attention, int64_t num_blocks) const;
  // The attention of this step.
  AttentionArgs batch_of(AttentionArgs attention, Team* team) const;

  const int32_t *query_start_loc, *seq_lens, *block_table;
  const int64_t* slots;
  int64_t num_requests, max_blocks, table_stride;
};

// Which rows carry whose states on, one round after the other.
class Rounds : public StepPart {
 public:
  // Of each round: see `Pieces`.
  Rounds(const std::vector<Sizes>& rounds, int64_t num_tokens);
  // Raises if a piece is none of the rows, or a state none of so many blocks. The number of rows in pieces.
  int64_t check(int64_t num_blocks) const;

  std::vector<Pieces> pieces;
};

// Cosines and sines of each token, or factors, and the strides of their rows.
struct Angles {
  const float *cos, *sin;
  int64_t cos_stride, sin_stride;
};

// One call of a layer: the level is chosen once, and rows are counted once.
struct Turn {
  const Level& level;
  int64_t rows;
  Team* team;  // null: kernels share their work through OpenMP

  void multiply(const Linear& by, DType dtype, const char* in, char* out, int64_t stride = 0) const {
    const LinearWeights& w = by.weights();
    if (!level.linear->multiply({&w, dtype, in, out, rows, stride ? stride : w.num_inputs, w.num_outputs, team}))
      throw std::bad_alloc();
  }
};

class Mixing {
 public:
  virtual ~Mixing() = default;
  // Raises what the contents of a step would break.
  virtual void check(const StepPart& part) const = 0;
  // x [T, H], normalised, to out [T, H], the last projection included; both contiguous.
  virtual void run(const Turn& turn, const StepPart& part, const Angles& angles, const char* x, char* out) const = 0;
  // By what it multiplies first.
  virtual const LinearWeights& first() const = 0;
};

// The step's part as a mixing needs it.
template <class Part>
const Part& part_as(const StepPart& part) {
  const Part* found = dynamic_cast<const Part*>(&part);
  if (!found) throw std::invalid_argument("a step of attention was given to a mixer, or the reverse");
  return *found;
}

// A mixing that carries a state from token to token, in pages.
class StateMixing : public Mixing {
 public:
  // Addresses of the convolution's inputs and of the states, blocks, strides of both.
  void bind_pages(const Sizes& pages);
  void check(const StepPart& part) const override { part_as<Rounds>(part).check(pages_.at(2)); }
  // x, out [T, H], contiguous, of as many rows as the step has.
  void run_alone(int64_t x, int64_t out, const Rounds& rounds) const;

 protected:
  Sizes pages_ = Sizes(5, 0);
};

// Add them to the Python module.
void bind_mixing(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_latent(nanobind::module_& m);
void bind_mixer(nanobind::module_& m);
void bind_delta(nanobind::module_& m);
void bind_layers_in_one_call(nanobind::module_& m);
}  // namespace quire
