// Decoder layers in one call: the kernels of their operators in their order, so their bits are theirs. What it saves is
// what lies between two operators: the interpreter, and threads that fall asleep meanwhile.
// Shapes and dtypes are checked in Python (kernels_cpu/decoder.py); what only the contents can tell, here.
#include "decoder_module.h"

#include <nanobind/stl/vector.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "batch_checks.h"
#include "buffers.h"
#include "experts_module.h"
#include "levels.h"
#include "linear_module.h"

namespace nb = nanobind;

namespace quire {
namespace {

using Sizes = std::vector<int64_t>;
constexpr int64_t MLP_ROWS = 512;  // rows that go through the MLP together: what lies between stays in the caches

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What one step asks of every layer of a group. Python keeps the tensors alive.
struct Step {
  const int32_t *query_start_loc, *seq_lens, *block_table;
  const int64_t* slots;
  int64_t num_requests, max_blocks, table_stride, num_tokens;

  // sizes: requests, tokens, columns and row stride of the block table.
  Step(uintptr_t query_start_loc, uintptr_t seq_lens, uintptr_t block_table, uintptr_t slots, const Sizes& sizes)
      : query_start_loc(at<const int32_t>(query_start_loc)), seq_lens(at<const int32_t>(seq_lens)),
        block_table(at<const int32_t>(block_table)), slots(at<const int64_t>(slots)), num_requests(sizes.at(0)),
        max_blocks(sizes.at(2)), table_stride(sizes.at(3)), num_tokens(sizes.at(1)) {}
};

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

class DecoderLayer {
 public:
  // norms: after attention, before the MLP, after the MLP, of what follows; of queries, of keys; 0 where there is none.
  // sizes: hidden, query heads, key heads, head size, rotated pairs, window, chunk.
  // gate_up, down: null where `mixture` takes their place.
  DecoderLayer(int dtype, int64_t element_size, const Linear& qkv, const Linear& output, const Linear* gate_up,
               const Linear* down, const Mixture* mixture, const std::vector<uintptr_t>& norms, uintptr_t sinks, const Sizes& sizes, int gate,
               float eps, float scale, float soft_cap, bool is_interleaved, bool is_norm_joint)
      : dtype_(DType(dtype)), element_size_(element_size), qkv_(qkv), output_(output), gate_up_(gate_up), down_(down),
        mixture_(mixture), norms_(norms), gate_(Gate(gate)), eps_(eps), is_interleaved_(is_interleaved), is_norm_joint_(is_norm_joint) {
    if (norms.size() != 6 || sizes.size() != 7) throw std::invalid_argument("six norms and seven sizes");
    if (mixture ? gate_up || down : !gate_up || !down) throw std::invalid_argument("one MLP, or one mixture");
    hidden_ = sizes[0], pairs_ = sizes[4];
    attention_.dtype = dtype_;
    attention_.num_heads = sizes[1], attention_.num_kv_heads = sizes[2];
    attention_.head_size = attention_.v_head_size = sizes[3];
    attention_.q_head_stride = attention_.out_head_stride = sizes[3];
    attention_.q_token_stride = (sizes[1] + 2 * sizes[2]) * sizes[3];
    attention_.out_token_stride = sizes[1] * sizes[3];
    attention_.window = sizes[5], attention_.chunk = sizes[6];
    attention_.scale = scale, attention_.soft_cap = soft_cap;
    attention_.sinks = at<const float>(sinks);
  }

  // sizes: blocks, block size; strides: k (block, slot, head), v (block, slot, head).
  void bind_cache(int stored, uintptr_t k, uintptr_t v, uintptr_t k_scales, uintptr_t v_scales,
                  const Sizes& sizes, const Sizes& strides) {
    if (sizes.size() != 2 || strides.size() != 6) throw std::invalid_argument("two sizes and six strides");
    AttentionArgs& a = attention_;
    a.stored = Stored(stored);
    a.k_cache = at<const void>(k), a.v_cache = at<const void>(v);
    a.k_scales = at<const float>(k_scales), a.v_scales = at<const float>(v_scales);
    num_blocks_ = sizes[0], a.block_size = sizes[1];
    a.k_block_stride = strides[0], a.k_slot_stride = strides[1], a.k_head_stride = strides[2];
    a.v_block_stride = strides[3], a.v_slot_stride = strides[4], a.v_head_stride = strides[5];
  }

  // What `Angles` says of a step: cosines and sines, and the strides of their rows.
  struct Angles {
    const float *cos, *sin;
    int64_t cos_stride, sin_stride;
  };

  // Raises what the contents of a step would break.
  void check(const Step& step) const {
    check_batch(batch_of(step, nullptr), step.num_tokens, num_blocks_, step.max_blocks);
    check_slots(step.slots, step.num_tokens, num_blocks_ * attention_.block_size);
  }

  // x [T, H] in, and out: normalised for what follows; residual [T, H] in place. `next`: who follows, or null.
  void run(const Step& step, char* x, char* residual, const Angles& angles, Team* team, const DecoderLayer* next) const {
    const AttentionArgs a = batch_of(step, team);
    const Call call{*this, chosen_level(), step.num_tokens, x, residual, team};
    call.attend(a, step, angles);
    call.follow();
    if (next) announce(team, ahead_of(next->qkv_.weights()));
  }

 private:
  AttentionArgs batch_of(const Step& step, Team* team) const {
    AttentionArgs a = attention_;
    a.query_start_loc = step.query_start_loc, a.seq_lens = step.seq_lens, a.block_table = step.block_table;
    a.num_requests = step.num_requests, a.table_stride = step.table_stride;
    a.team = team;
    return a;
  }

  // One call: the level is chosen once, and rows are counted once.
  struct Call {
    const DecoderLayer& layer;
    const Level level;
    int64_t rows;
    char *x, *residual;
    Team* team;

    void multiply(const Linear& by, const char* in, char* out, int64_t count) const {
      const LinearWeights& w = by.weights();
      if (!level.linear->multiply({&w, layer.dtype_, in, out, count, w.num_inputs, w.num_outputs, team}))
        throw std::bad_alloc();
    }

    void norm(const char* in, char* sum, int index, char* out, int64_t count, int64_t width, int64_t stride) const {
      const void* weight = at<const void>(layer.norms_[size_t(index)]);
      if (weight)
        level.kernels->rms_norm({layer.dtype_, in, sum, weight, out, count, width, stride, sum ? stride : 0, stride,
                                 layer.eps_});
    }

    // Each head, or all of them together.
    void norm_heads(char* heads, int index, int64_t count) const {
      if (!layer.norms_[size_t(index)]) return;
      const int64_t size = layer.attention_.head_size, bytes = layer.attention_.q_token_stride * layer.element_size_;
      const int64_t rows_of_token = layer.is_norm_joint_ ? 1 : count, width = layer.is_norm_joint_ ? count * size : size;
#pragma omp parallel for schedule(static) if (rows > 16)
      for (int64_t t = 0; t < rows; ++t) norm(heads + t * bytes, nullptr, index, heads + t * bytes, rows_of_token, width, width);
    }

    void rotate(char* heads, int64_t count, const Angles& angles) const {
      const AttentionArgs& a = layer.attention_;
      if (layer.pairs_)
        level.kernels->rotary({layer.dtype_, heads, angles.cos, angles.sin, rows, count, layer.pairs_, a.q_token_stride,
                               a.head_size, angles.cos_stride, angles.sin_stride, layer.is_interleaved_});
    }

    void write(const char* heads, const Step& step, bool is_key) const {
      const AttentionArgs& a = layer.attention_;
      CacheWriteArgs w{};
      w.dtype = layer.dtype_, w.stored = a.stored, w.element_size = layer.element_size_;
      w.source = heads, w.slots = step.slots;
      w.cache = const_cast<void*>(is_key ? a.k_cache : a.v_cache);
      w.scales = const_cast<float*>(is_key ? a.k_scales : a.v_scales);
      w.num_tokens = rows, w.num_heads = a.num_kv_heads, w.head_size = a.head_size, w.block_size = a.block_size;
      w.token_stride = a.q_token_stride, w.head_stride = a.head_size;
      w.block_stride = is_key ? a.k_block_stride : a.v_block_stride;
      w.slot_stride = is_key ? a.k_slot_stride : a.v_slot_stride;
      w.cache_head_stride = is_key ? a.k_head_stride : a.v_head_stride;
      level.kernels->write_cache(w);
    }

    // From x to the normalised input of the MLP, which takes the place of x.
    void attend(AttentionArgs a, const Step& step, const Angles& angles) const {
      const int64_t size = layer.element_size_, head = a.head_size * size;
      const int64_t of_heads = rows * a.q_token_stride * size, of_out = rows * a.out_token_stride * size;
      const int64_t of_sum = rows * layer.hidden_ * size;
      Buffers buffers(Buffers::padded(of_heads) + Buffers::padded(of_out) + Buffers::padded(of_sum));
      char *heads = buffers.take(of_heads), *attended = buffers.take(of_out), *sum = buffers.take(of_sum);
      char *keys = heads + a.num_heads * head, *values = keys + a.num_kv_heads * head;
      multiply(layer.qkv_, x, heads, rows);
      announce(team, ahead_of(layer.output_.weights()));
      norm_heads(heads, 4, a.num_heads);
      norm_heads(keys, 5, a.num_kv_heads);
      rotate(heads, a.num_heads, angles);
      rotate(keys, a.num_kv_heads, angles);
      write(keys, step, true);
      write(values, step, false);
      a.q = heads, a.out = attended;
      if (!level.kernels->paged_attention(a)) throw std::bad_alloc();
      multiply(layer.output_, attended, sum, rows);
      if (layer.gate_up_) announce(team, ahead_of(layer.gate_up_->weights()));
      norm(sum, nullptr, 0, sum, rows, layer.hidden_, layer.hidden_);
      norm(sum, residual, 1, x, rows, layer.hidden_, layer.hidden_);
    }

    // The mixture, or the MLP some rows at a time: a row's bits do not depend on its company.
    void follow() const {
      if (layer.mixture_) return mix();
      const int64_t hidden = layer.hidden_, inner = layer.down_->weights().num_inputs, size = layer.element_size_;
      const int64_t most = rows < MLP_ROWS ? rows : MLP_ROWS;
      Buffers buffers(Buffers::padded(most * 2 * inner * size) + Buffers::padded(most * inner * size) +
                      Buffers::padded(most * hidden * size));
      char *both = buffers.take(most * 2 * inner * size), *gated = buffers.take(most * inner * size);
      char* sum = buffers.take(most * hidden * size);
      for (int64_t row = 0; row < rows; row += most) {
        const int64_t count = rows - row < most ? rows - row : most, offset = row * hidden * size;
        multiply(*layer.gate_up_, x + offset, both, count);
        announce(team, ahead_of(layer.down_->weights()));
        level.kernels->gated_activation({layer.dtype_, layer.gate_, both, gated, count, inner, 2 * inner, inner});
        multiply(*layer.down_, gated, sum, count);
        norm(sum, nullptr, 2, sum, count, hidden, hidden);
        norm(sum, residual + offset, 3, x + offset, count, hidden, hidden);
      }
    }

    void mix() const {
      const int64_t hidden = layer.hidden_, bytes = rows * hidden * layer.element_size_;
      Buffers buffers(Buffers::padded(bytes));
      char* sum = buffers.take(bytes);
      layer.mixture_->run(level, x, sum, rows, team);
      norm(sum, nullptr, 2, sum, rows, hidden, hidden);
      norm(sum, residual, 3, x, rows, hidden, hidden);
    }
  };

  DType dtype_;
  int64_t element_size_;
  const Linear &qkv_, &output_;  // Python keeps them and what follows alive
  const Linear *gate_up_, *down_;
  const Mixture* mixture_;
  std::vector<uintptr_t> norms_;
  Gate gate_;
  float eps_;
  bool is_interleaved_, is_norm_joint_;
  int64_t hidden_ = 0, pairs_ = 0, num_blocks_ = 0;
  AttentionArgs attention_{};
};

// Layers one after the other, in one call: the threads stay awake from the first to the last.
class DecoderChain {
 public:
  // groups, ropes: of each layer, which of the steps and of the angles are its own.
  DecoderChain(std::vector<const DecoderLayer*> layers, std::vector<size_t> groups, std::vector<size_t> ropes)
      : layers_(std::move(layers)), groups_(std::move(groups)), ropes_(std::move(ropes)) {
    if (groups_.size() != layers_.size() || ropes_.size() != layers_.size())
      throw std::invalid_argument("each layer has a group and a rope");
  }

  // angles: for each rope the addresses of cosines and sines, and the strides of their rows.
  void run(const std::vector<const Step*>& steps, uintptr_t x, uintptr_t residual,
           const std::vector<std::vector<int64_t>>& angles) const {
    std::vector<DecoderLayer::Angles> rotations;
    for (const auto& one : angles)
      rotations.push_back({at<const float>(uintptr_t(one.at(0))), at<const float>(uintptr_t(one.at(1))), one.at(2), one.at(3)});
    for (size_t i = 0; i < layers_.size(); ++i) {
      if (ropes_[i] >= rotations.size()) throw std::invalid_argument("angles are missing");
      layers_[i]->check(*steps.at(groups_[i]));
    }
    if (layers_.empty()) return;
    nb::gil_scoped_release released;
    with_team(steps.at(groups_[0])->num_tokens <= ROWS_OF_TEAM, [&](Team* team) {
      for (size_t i = 0; i < layers_.size(); ++i)
        layers_[i]->run(*steps[groups_[i]], at<char>(x), at<char>(residual), rotations[ropes_[i]], team,
                        i + 1 < layers_.size() ? layers_[i + 1] : nullptr);
    });
  }

 private:
  std::vector<const DecoderLayer*> layers_;  // Python keeps them alive
  std::vector<size_t> groups_, ropes_;
};

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<Step>(m, "Step").def(nb::init<uintptr_t, uintptr_t, uintptr_t, uintptr_t, const Sizes&>());
  nb::class_<DecoderLayer>(m, "DecoderLayer")
      .def(nb::init<int, int64_t, const Linear&, const Linear&, const Linear*, const Linear*, const Mixture*,
                    const std::vector<uintptr_t>&, uintptr_t, const Sizes&, int, float, float, float, bool, bool>(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg().none(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::keep_alive<1, 4>(),
           nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 8>())
      .def("bind_cache", &DecoderLayer::bind_cache);
  nb::class_<DecoderChain>(m, "DecoderChain")
      .def(nb::init<std::vector<const DecoderLayer*>, std::vector<size_t>, std::vector<size_t>>())
      .def("run", &DecoderChain::run);
}

}  // namespace quire
