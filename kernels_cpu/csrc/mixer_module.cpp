// A mixer of Mamba or Mamba-2 in one call: projections, convolution, scan and gate in their order.
// Shapes and dtypes are checked in Python (kernels_cpu/mixer.py); what only the contents can tell, here.
#include "mixing.h"

#include <nanobind/stl/vector.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffers.h"

namespace nb = nanobind;

namespace quire {
namespace {

// Mamba has `x_proj` and `dt_proj`; Mamba-2 has neither.
class FusedMixer : public StateMixing {
 public:
  // tensors: weight and bias of the convolution, a, d, bias of the time steps, norm after the scan; norms of time steps,
  // B and C; 0 where there is none. sizes: bytes of an element, inner, convolved channels, taps, size of the state, rank
  // or heads, groups.
  FusedMixer(int dtype, const Linear& in, const Linear& out, const Linear* x_proj, const Linear* dt_proj,
             const Sizes& tensors, const Sizes& sizes, float eps, bool is_norm_first)
      : dtype_(DType(dtype)), in_(in), out_(out), x_proj_(x_proj), dt_proj_(dt_proj), tensors_(tensors), eps_(eps),
        is_norm_first_(is_norm_first) {
    if (tensors.size() != 9 || sizes.size() != 7) throw std::invalid_argument("nine tensors and seven sizes");
    element_size_ = sizes[0], inner_ = sizes[1], convolved_ = sizes[2], taps_ = sizes[3], state_ = sizes[4];
    rank_ = sizes[5], groups_ = sizes[6];
  }

  const LinearWeights& first() const override { return in_.weights(); }

  void run(const Turn& turn, const StepPart& part, const Angles&, const char* x, char* out) const override {
    const Rounds& rounds = part_as<Rounds>(part);
    Call{*this, turn, pages_, rounds.pieces, rounds.check(pages_[2]) < turn.rows}.run(x, out);
  }

 private:
  // One call.
  struct Call {
    const FusedMixer& mixer;
    const Turn& turn;
    const Sizes& pages;
    const std::vector<Pieces>& rounds;
    bool has_padding;

    void run(const char* x, char* out) const {
      const int64_t rows = turn.rows;
      const int64_t size = mixer.element_size_, width = mixer.in_.weights().num_outputs;
      const bool is_first = mixer.x_proj_;
      const int64_t of_all = rows * width * size, of_mixed = rows * mixer.convolved_ * size;
      const int64_t of_scanned = rows * mixer.inner_ * size;
      const int64_t of_times = rows * (is_first ? mixer.inner_ : mixer.rank_) * int64_t(sizeof(float));
      Buffers buffers(Buffers::padded(of_all) + Buffers::padded(of_mixed) + Buffers::padded(of_scanned) +
                      Buffers::padded(of_times));
      char *all = buffers.take(of_all), *mixed = buffers.take(of_mixed), *scanned = buffers.take(of_scanned);
      float* times = reinterpret_cast<float*>(buffers.take(of_times));
      multiply(mixer.in_, x, all, mixer.in_.weights().num_inputs);
      announce(turn.team, ahead_of((mixer.x_proj_ ? *mixer.x_proj_ : mixer.out_).weights()));
      if (has_padding) std::memset(mixed, 0, size_t(of_mixed)), std::memset(scanned, 0, size_t(of_scanned));
      convolve(all + (is_first ? 0 : mixer.inner_ * size), width, mixed);
      if (is_first)
        scan_channels(mixed, times, scanned);
      else
        scan_heads(all + (mixer.inner_ + mixer.convolved_) * size, width, mixed, times, scanned);
      const char* gate = all + (is_first ? mixer.inner_ * size : 0);
      turn.level.layers->open_gate({mixer.dtype_, scanned, gate, tensor(5), rows, mixer.inner_,
                               tensor(5) ? mixer.groups_ : 1, width, mixer.eps_, mixer.is_norm_first_, turn.team});
      multiply(mixer.out_, scanned, out, mixer.inner_);
    }

    const void* tensor(size_t index) const { return at<const void>(mixer.tensors_[index]); }
    const float* numbers(size_t index) const { return at<const float>(mixer.tensors_[index]); }

    void multiply(const Linear& by, const char* in, char* out, int64_t stride) const {
      turn.multiply(by, mixer.dtype_, in, out, stride);
    }

    void convolve(const char* x, int64_t stride, char* out) const {
      for (const Pieces& piece : rounds)
        if (!turn.level.layers->conv({mixer.dtype_, x, tensor(0), tensor(1), at<void>(pages[0]), out, piece.with_stride(pages[3]),
                                 mixer.convolved_, mixer.taps_, stride, true, turn.team}))
          throw std::bad_alloc();
    }

    // Mamba: time steps, B and C come from the convolved channels.
    void scan_channels(const char* mixed, float* times, char* out) const {
      const int64_t rows = turn.rows, size = mixer.element_size_, rank = mixer.rank_, state = mixer.state_, width = rank + 2 * state;
      Buffers buffers(Buffers::padded(rows * width * size) + Buffers::padded(rows * mixer.inner_ * size));
      char *small = buffers.take(rows * width * size), *steps = buffers.take(rows * mixer.inner_ * size);
      multiply(*mixer.x_proj_, mixed, small, mixer.inner_);
      char *b = small + rank * size, *c = b + state * size;
      norm(small, 6, rank, width);
      norm(b, 7, state, width);
      norm(c, 8, state, width);
      multiply(*mixer.dt_proj_, small, steps, width);
      turn.level.layers->soften({mixer.dtype_, steps, numbers(4), times, rows, mixer.inner_, mixer.inner_, turn.team});
      for (const Pieces& piece : rounds)
        if (!turn.level.layers->selective_scan({mixer.dtype_, mixed, times, numbers(2), {mixer.dtype_, b, width},
                                           {mixer.dtype_, c, width}, numbers(3), at<float>(pages[1]), out,
                                           piece.with_stride(pages[4]), mixer.inner_, state, mixer.inner_, mixer.inner_,
                                           turn.team}))
          throw std::bad_alloc();
    }

    // Mamba-2: time steps come from the first projection, B and C are convolved with the channels.
    void scan_heads(const char* steps, int64_t stride, const char* mixed, float* times, char* out) const {
      const int64_t size = mixer.element_size_, heads = mixer.rank_, state = mixer.state_, convolved = mixer.convolved_;
      const char *b = mixed + mixer.inner_ * size, *c = b + mixer.groups_ * state * size;
      turn.level.layers->soften({mixer.dtype_, steps, numbers(4), times, turn.rows, heads, stride, turn.team});
      for (const Pieces& piece : rounds)
        if (!turn.level.layers->ssd_scan({mixer.dtype_, mixed, times, numbers(2), {mixer.dtype_, b, convolved},
                                     {mixer.dtype_, c, convolved}, numbers(3), at<float>(pages[1]), out,
                                     piece.with_stride(pages[4]), heads, mixer.inner_ / heads, mixer.groups_, state,
                                     convolved, heads, turn.team}))
          throw std::bad_alloc();
    }

    void norm(char* x, size_t index, int64_t width, int64_t stride) const {
      if (tensor(index))
        turn.level.kernels->rms_norm({mixer.dtype_, x, nullptr, tensor(index), x, turn.rows, width, stride, 0, stride, mixer.eps_});
    }
  };

  DType dtype_;
  const Linear &in_, &out_;  // Python keeps them alive
  const Linear *x_proj_, *dt_proj_;
  Sizes tensors_;
  float eps_;
  bool is_norm_first_;
  int64_t element_size_ = 0, inner_ = 0, convolved_ = 0, taps_ = 0, state_ = 0, rank_ = 0, groups_ = 1;
};

}  // namespace

void bind_mixer(nb::module_& m) {
  nb::class_<FusedMixer, StateMixing>(m, "FusedMixer")
      .def(nb::init<int, const Linear&, const Linear&, const Linear*, const Linear*, const Sizes&, const Sizes&, float,
                    bool>(),
           nb::arg("dtype"), nb::arg("in_proj"), nb::arg("out_proj"), nb::arg("x_proj").none(), nb::arg("dt_proj").none(),
           nb::arg("tensors"), nb::arg("sizes"), nb::arg("eps"), nb::arg("is_norm_first"), nb::keep_alive<1, 3>(),
           nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>());
}

}  // namespace quire
