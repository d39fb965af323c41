// Attention with keys and values of its own heads, in one call: the kernels of its operators in their order.
// Shapes and dtypes are checked in Python (kernels_cpu/heads.py); what only the contents can tell, here.
#include <nanobind/stl/vector.h>

#include "buffers.h"
#include "cached_attention.h"

namespace nb = nanobind;

namespace quire {
namespace {

class HeadAttention : public CachedMixing {
 public:
  // norms: of queries, of keys, of both after the rotation; 0 where there is none. sizes: of `CachedAttention`, then
  // rotated pairs. flags: pairs lie side by side; one norm for all heads; queries are multiplied by their token's factor;
  // gates follow the values.
  HeadAttention(int dtype, const Linear& qkv, const Linear& output, const Sizes& norms, int64_t sinks, const Sizes& sizes,
                float eps, float scale, float soft_cap, const std::vector<bool>& flags)
      : CachedMixing(DType(dtype), sizes, scale, soft_cap, at<const float>(sinks)), qkv_(qkv), output_(output),
        norms_(norms), eps_(eps) {
    if (norms.size() != 3 || flags.size() != 4) throw std::invalid_argument("three norms and four flags");
    is_interleaved_ = flags[0], is_norm_joint_ = flags[1], has_factors_ = flags[2], has_gates_ = flags[3];
  }

  const LinearWeights& first() const override { return qkv_.weights(); }

  void run(const Turn& turn, const StepPart& part, const Angles& angles, const char* x, char* out) const override {
    const Step& step = part_as<Step>(part);
    const AttentionArgs& a = cached_.args();
    const int64_t size = cached_.element_size(), width = qkv_.weights().num_outputs;
    const int64_t of_all = turn.rows * width * size, of_out = turn.rows * a.out_token_stride * size;
    Buffers buffers(Buffers::padded(of_all) + Buffers::padded(of_out));
    char *queries = buffers.take(of_all), *attended = buffers.take(of_out);
    char* keys = queries + a.num_heads * a.head_size * size;
    char* values = keys + a.num_kv_heads * a.head_size * size;
    turn.multiply(qkv_, a.dtype, x, queries);
    announce(turn.team, ahead_of(output_.weights()));
    norm(turn, queries, 0, a.num_heads);
    norm(turn, keys, 1, a.num_kv_heads);
    rotate(turn, queries, a.num_heads, angles);
    rotate(turn, keys, a.num_kv_heads, angles);
    norm(turn, queries, 2, a.num_heads);
    norm(turn, keys, 2, a.num_kv_heads);
    if (has_factors_)
      turn.level.layers->scale({a.dtype, queries, angles.cos, turn.rows, a.num_heads * a.head_size, width, angles.cos_stride});
    cached_.write(turn, step, keys, width, true);
    cached_.write(turn, step, values, width, false);
    cached_.attend(turn, step, queries, width, attended);
    const char* gates = values + a.num_kv_heads * a.v_head_size * size;
    if (has_gates_) turn.level.layers->weigh({a.dtype, attended, gates, turn.rows, a.out_token_stride, width, false});
    turn.multiply(output_, a.dtype, attended, out);
  }

 private:
  // Each head, or all of them together.
  void norm(const Turn& turn, char* heads, size_t index, int64_t count) const {
    const void* weight = at<const void>(norms_[index]);
    if (!weight) return;
    const int64_t size = cached_.args().head_size, bytes = qkv_.weights().num_outputs * cached_.element_size();
    const int64_t heads_of_token = is_norm_joint_ ? 1 : count, width = is_norm_joint_ ? count * size : size;
#pragma omp parallel for schedule(static) if (turn.rows > 16)
    for (int64_t t = 0; t < turn.rows; ++t) {
      char* row = heads + t * bytes;
      turn.level.kernels->rms_norm({cached_.args().dtype, row, nullptr, weight, row, heads_of_token, width, width, 0, width, eps_});
    }
  }

  void rotate(const Turn& turn, char* heads, int64_t count, const Angles& angles) const {
    if (pairs_)
      turn.level.kernels->rotary({cached_.args().dtype, heads, angles.cos, angles.sin, turn.rows, count, pairs_,
                                  qkv_.weights().num_outputs, cached_.args().head_size, angles.cos_stride,
                                  angles.sin_stride, is_interleaved_});
  }

  const Linear &qkv_, &output_;  // Python keeps them alive
  Sizes norms_;
  float eps_;
  bool is_interleaved_, is_norm_joint_, has_factors_, has_gates_;
};

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<HeadAttention, CachedMixing>(m, "HeadAttention")
      .def(nb::init<int, const Linear&, const Linear&, const Sizes&, int64_t, const Sizes&, float, float, float,
                    const std::vector<bool>&>(),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());
}

}  // namespace quire
