// A mixer of a gated delta net in one call: projections, convolution, delta rule and gate in their order.
// Shapes and dtypes are checked in Python (kernels_cpu/delta_mixer.py); what only the contents can tell, here.
#include <nanobind/stl/vector.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "buffers.h"
#include "mixing.h"

namespace nb = nanobind;

namespace quire {
namespace {

class FusedDelta : public StateMixing {
 public:
  // tensors: weight and bias of the convolution, a, bias of the time steps, norm; 0 where there is none. sizes: bytes of
  // an element, heads of keys, their size, heads of values, their size, taps.
  FusedDelta(int dtype, const Linear& in, const Linear& out, const Sizes& tensors, const Sizes& sizes, float eps)
      : dtype_(DType(dtype)), in_(in), out_(out), tensors_(tensors), eps_(eps) {
    if (tensors.size() != 5 || sizes.size() != 6) throw std::invalid_argument("five tensors and six sizes");
    element_size_ = sizes[0], groups_ = sizes[1], size_ = sizes[2], heads_ = sizes[3], v_size_ = sizes[4], taps_ = sizes[5];
    values_ = heads_ * v_size_, convolved_ = 2 * groups_ * size_ + values_;
  }

  const LinearWeights& first() const override { return in_.weights(); }

  void run(const Turn& turn, const StepPart& part, const Angles&, const char* x, char* out) const override {
    const Rounds& rounds = part_as<Rounds>(part);
    Call{*this, turn, pages_, rounds.pieces, rounds.check(pages_[2]) < turn.rows}.run(x, out);
  }

 private:
  // What the delta rule reads and writes, in float32.
  struct Numbers {
    float *q, *k, *v, *y, *decay, *beta;
  };

  // One call.
  struct Call {
    const FusedDelta& mixer;
    const Turn& turn;
    const Sizes& pages;
    const std::vector<Pieces>& rounds;
    bool has_padding;

    void run(const char* x, char* out) const {
      const int64_t rows = turn.rows;
      const int64_t size = mixer.element_size_, width = mixer.in_.weights().num_outputs;
      const int64_t of_all = rows * width * size, of_mixed = rows * mixer.convolved_ * size;
      const int64_t of_opened = rows * mixer.values_ * size, word = sizeof(float);
      const int64_t of_keys = rows * mixer.groups_ * mixer.size_ * word, of_values = rows * mixer.values_ * word;
      const int64_t of_heads = rows * mixer.heads_ * word;
      Buffers buffers(Buffers::padded(of_all) + Buffers::padded(of_mixed) + Buffers::padded(of_opened) +
                      2 * (Buffers::padded(of_keys) + Buffers::padded(of_values) + Buffers::padded(of_heads)));
      char *all = buffers.take(of_all), *mixed = buffers.take(of_mixed), *opened = buffers.take(of_opened);
      const auto floats = [&](int64_t bytes) { return reinterpret_cast<float*>(buffers.take(bytes)); };
      const Numbers n{floats(of_keys),   floats(of_keys),  floats(of_values),
                      floats(of_values), floats(of_heads), floats(of_heads)};
      multiply(mixer.in_, x, all, mixer.in_.weights().num_inputs);
      announce(turn.team, ahead_of(mixer.out_.weights()));
      if (has_padding) std::memset(mixed, 0, size_t(of_mixed)), std::memset(n.y, 0, size_t(of_values));
      convolve(all, width, mixed);
      const char *gate = all + mixer.convolved_ * size, *betas = gate + mixer.values_ * size;
      turn.level.layers->associate({mixer.dtype_, mixed, betas, betas + mixer.heads_ * size, numbers(2), numbers(3), n.q, n.k,
                               n.v, n.decay, n.beta, rows, mixer.groups_, mixer.size_, mixer.heads_, mixer.v_size_, width,
                               1e-6f, turn.team});
      recall(n);
      turn.level.layers->open_heads(
          {mixer.dtype_, n.y, gate, numbers(4), opened, rows, mixer.heads_, mixer.v_size_, width, mixer.eps_,
           turn.team});
      multiply(mixer.out_, opened, out, mixer.values_);
    }

    const float* numbers(size_t index) const { return at<const float>(mixer.tensors_[index]); }

    void multiply(const Linear& by, const char* in, char* out, int64_t stride) const {
      turn.multiply(by, mixer.dtype_, in, out, stride);
    }

    void convolve(const char* x, int64_t stride, char* out) const {
      for (const Pieces& piece : rounds)
        if (!turn.level.layers->conv({mixer.dtype_, x, at<const void>(mixer.tensors_[0]), at<const void>(mixer.tensors_[1]),
                                 at<void>(pages[0]), out, piece.with_stride(pages[3]), mixer.convolved_, mixer.taps_, stride,
                                 true, turn.team}))
          throw std::bad_alloc();
    }

    void recall(const Numbers& n) const {
      const int64_t keys = mixer.groups_ * mixer.size_;
      for (const Pieces& piece : rounds)
        if (!turn.level.layers->delta_rule({DType::f32, n.v, {DType::f32, n.q, keys}, {DType::f32, n.k, keys}, n.decay, n.beta,
                                       at<float>(pages[1]), n.y, piece.with_stride(pages[4]), mixer.heads_, mixer.v_size_,
                                       mixer.groups_, mixer.size_, mixer.values_, mixer.heads_, mixer.heads_,
                                       turn.team}))
          throw std::bad_alloc();
    }
  };

  DType dtype_;
  const Linear &in_, &out_;  // Python keeps them alive
  Sizes tensors_;
  float eps_;
  int64_t element_size_ = 0, groups_ = 0, size_ = 0, heads_ = 0, v_size_ = 0, taps_ = 0, values_ = 0, convolved_ = 0;
};

}  // namespace

void bind_delta(nb::module_& m) {
  nb::class_<FusedDelta, StateMixing>(m, "FusedDelta")
      .def(nb::init<int, const Linear&, const Linear&, const Sizes&, const Sizes&, float>(), nb::arg("dtype"),
           nb::arg("in_proj"), nb::arg("out_proj"), nb::arg("tensors"), nb::arg("sizes"), nb::arg("eps"),
           nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>());
}

}  // namespace quire
