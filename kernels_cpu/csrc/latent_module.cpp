// Attention over one latent for all heads, in one call: the kernels of its operators in their order.
// Shapes and dtypes are checked in Python (kernels_cpu/latent.py); what only the contents can tell, here.
// Source: DeepSeek-V2 report, section 2.1 and appendix C (absorbed projections).
#include <nanobind/stl/vector.h>

#include <cstring>

#include "buffers.h"
#include "cached_attention.h"

namespace nb = nanobind;

namespace quire {
namespace {

// A projection of its own for each head: where its weight lies, and its strides (head, row, column).
struct HeadWeight {
  const void* data;
  int64_t outputs, inputs, head_stride, row_stride, column_stride;

  explicit HeadWeight(const Sizes& all)
      : data(at<const void>(all.at(0))), outputs(all.at(1)), inputs(all.at(2)), head_stride(all.at(3)),
        row_stride(all.at(4)), column_stride(all.at(5)) {
    if (row_stride != 1 && column_stride != 1)
      throw std::invalid_argument("a head's weight is dense in neither direction");
  }
};

class LatentAttention : public CachedMixing {
 public:
  // q_down: null where queries come from x. norms: of what q_down gives, of the latent. keys, values: see `HeadWeight`.
  // sizes: of `CachedAttention`, then rotated pairs.
  LatentAttention(int dtype, const Linear* q_down, const Linear& q_up, const Linear& kv_down, const Linear& output,
                  const Sizes& norms, const Sizes& keys, const Sizes& values, const Sizes& sizes, float eps, float scale,
                  bool is_interleaved)
      : CachedMixing(DType(dtype), sizes, scale, 0, nullptr), q_down_(q_down), q_up_(q_up), kv_down_(kv_down),
        output_(output), norms_(norms), keys_(keys), values_(values), eps_(eps), is_interleaved_(is_interleaved) {
    if (norms.size() != 2) throw std::invalid_argument("two norms");
  }

  const LinearWeights& first() const override { return kv_down_.weights(); }

  void run(const Turn& turn, const StepPart& part, const Angles& angles, const char* x, char* out) const override {
    const Step& step = part_as<Step>(part);
    const AttentionArgs& a = cached_.args();
    const int64_t size = cached_.element_size(), rows = turn.rows, heads = a.num_heads, rank = a.v_head_size;
    const int64_t plain = keys_.inputs, rotated = a.head_size - rank, own = plain + rotated;
    const int64_t of_key = rows * a.head_size * size, of_own = rows * heads * own * size;
    const int64_t of_query = rows * heads * a.head_size * size, of_latent = rows * heads * rank * size;
    const int64_t of_values = rows * heads * values_.outputs * size;
    Buffers buffers(Buffers::padded(of_key) + Buffers::padded(of_own) + Buffers::padded(of_query) +
                    Buffers::padded(of_latent) + Buffers::padded(of_values));
    char *key = buffers.take(of_key), *query = buffers.take(of_own), *whole = buffers.take(of_query);
    char *latent = buffers.take(of_latent), *values = buffers.take(of_values);
    turn.multiply(kv_down_, a.dtype, x, key);
    announce(turn.team, ahead_of((q_down_ ? *q_down_ : q_up_).weights()));
    norm(turn, key, 1, rank, a.head_size);
    rotate(turn, key + rank * size, 1, a.head_size, a.head_size, angles);
    make_queries(turn, x, query);
    announce(turn.team, ahead_of_heads(keys_));
    rotate(turn, query + plain * size, heads, heads * own, own, angles);
    multiply_heads(turn, keys_, query, heads * own, own, whole, heads * a.head_size, a.head_size);
    announce(turn.team, ahead_of_heads(values_));
    for (int64_t i = 0; i < rows * heads; ++i)
      std::memcpy(whole + (i * a.head_size + rank) * size, query + (i * own + plain) * size, size_t(rotated * size));
    cached_.write(turn, step, key, a.head_size, true);
    cached_.attend(turn, step, whole, heads * a.head_size, latent);
    multiply_heads(turn, values_, latent, heads * rank, rank, values, heads * values_.outputs, values_.outputs);
    turn.multiply(output_, a.dtype, values, out);
  }

 private:
  void make_queries(const Turn& turn, const char* x, char* query) const {
    const DType dtype = cached_.args().dtype;
    if (!q_down_) return turn.multiply(q_up_, dtype, x, query);
    const int64_t width = q_down_->weights().num_outputs, bytes = turn.rows * width * cached_.element_size();
    Buffers buffers(Buffers::padded(bytes));
    char* small = buffers.take(bytes);
    turn.multiply(*q_down_, dtype, x, small);
    announce(turn.team, ahead_of(q_up_.weights()));
    norm(turn, small, 0, width, width);
    turn.multiply(q_up_, dtype, small, query);
  }

  void norm(const Turn& turn, char* x, size_t index, int64_t width, int64_t stride) const {
    turn.level.kernels->rms_norm({cached_.args().dtype, x, nullptr, at<const void>(norms_[index]), x, turn.rows, width, stride,
                                  0, stride, eps_});
  }

  void rotate(const Turn& turn, char* heads, int64_t count, int64_t token_stride, int64_t head_stride,
              const Angles& angles) const {
    turn.level.kernels->rotary({cached_.args().dtype, heads, angles.cos, angles.sin, turn.rows, count, pairs_, token_stride,
                                head_stride, angles.cos_stride, angles.sin_stride, is_interleaved_});
  }

  void multiply_heads(const Turn& turn, const HeadWeight& by, const char* x, int64_t x_stride, int64_t x_head, char* out,
                      int64_t out_stride, int64_t out_head) const {
    const AttentionArgs& a = cached_.args();
    turn.level.layers->head_linear({a.dtype, x, by.data, out, turn.rows, a.num_heads, by.outputs, by.inputs, x_stride,
                                    x_head, by.head_stride, by.row_stride, by.column_stride, out_stride, out_head,
                                    turn.team});
  }

  Ahead ahead_of_heads(const HeadWeight& by) const {
    return {static_cast<const char*>(by.data), cached_.args().num_heads, by.head_stride * cached_.element_size()};
  }

  const Linear* q_down_;  // Python keeps it and what follows alive
  const Linear &q_up_, &kv_down_, &output_;
  Sizes norms_;
  HeadWeight keys_, values_;
  float eps_;
  bool is_interleaved_;
};

}  // namespace

void bind_latent(nb::module_& m) {
  nb::class_<LatentAttention, CachedMixing>(m, "LatentAttention")
      .def(nb::init<int, const Linear*, const Linear&, const Linear&, const Linear&, const Sizes&, const Sizes&,
                    const Sizes&, const Sizes&, float, float, bool>(),
           nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(),
           nb::keep_alive<1, 6>());
}

}  // namespace quire
