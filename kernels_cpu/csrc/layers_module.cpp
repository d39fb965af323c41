// Experts, recurrences and the vocabulary for Python. Shapes, dtypes and strides are checked in Python; what only the
// contents can tell, here.
#include "layers_module.h"

#include <nanobind/stl/vector.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "levels.h"
#include "linear_pack.h"

namespace nb = nanobind;

namespace quire {
namespace {

using Sizes = std::vector<int64_t>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Runs a kernel without the interpreter's lock.
template <class Args>
void call(bool (*kernel)(const Args&), const Args& args) {
  bool has_memory;
  {
    nb::gil_scoped_release released;
    has_memory = kernel(args);
  }
  if (!has_memory) throw std::bad_alloc();
}

template <class Args>
void call(void (*kernel)(const Args&), const Args& args) {
  nb::gil_scoped_release released;
  kernel(args);
}

const LayerTable& kernels() { return *chosen_level().layers; }

void check_count(const Sizes& sizes, size_t count) {
  if (sizes.size() != count) throw std::invalid_argument("expected " + std::to_string(count) + " sizes");
}

// --- experts ---------------------------------------------------------------------------------------------------------

// sizes: tokens, experts, chosen, groups, kept groups, stride of the logits.
void route(uintptr_t logits, uintptr_t bias, uintptr_t weights, uintptr_t ids, const Sizes& sizes, float scale,
           bool is_sigmoid, bool is_renormalised, bool adds_two_best) {
  check_count(sizes, 6);
  const RouteArgs a{at<const float>(logits), at<const float>(bias), at<float>(weights), at<int64_t>(ids), sizes[0],
                    sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], scale, is_sigmoid, is_renormalised, adds_two_best};
  call(kernels().route, a);
}

// sizes: tokens, heads, outputs, inputs; strides of x (token, head) and weight (head, row).
void head_linear(int dtype, uintptr_t x, uintptr_t weight, uintptr_t out, const Sizes& sizes) {
  check_count(sizes, 9);
  const HeadLinearArgs a{DType(dtype), at<const void>(x), at<const void>(weight), at<void>(out), sizes[0], sizes[1],
                         sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8],
                         sizes[1] * sizes[2], sizes[2]};
  if (sizes[7] != 1 && sizes[8] != 1) throw std::invalid_argument("a head's weight is dense in neither direction");
  call(kernels().head_linear, a);
}

// --- recurrences -----------------------------------------------------------------------------------------------------

// slots: sources and targets of the states (addresses of int64 [S]; 0: each its own), states, and their stride.
Rows rows_of(uintptr_t starts, int64_t num_sequences, int64_t num_rows, const Sizes& slots) {
  check_count(slots, 4);
  const int32_t* first = at<const int32_t>(starts);
  const Rows rows{first, first + 1, num_sequences, at<const int64_t>(uintptr_t(slots[0])),
                  at<const int64_t>(uintptr_t(slots[1])), slots[3]};
  if (first[0] < 0 || first[num_sequences] > num_rows)
    throw std::invalid_argument("the starts of the sequences leave the " + std::to_string(num_rows) + " rows");
  for (int64_t s = 0; s < num_sequences; ++s)
    if (rows.ends[s] < rows.starts[s])
      throw std::invalid_argument("the starts of the sequences decrease at " + std::to_string(s));
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t source = rows.sources ? rows.sources[s] : s, target = rows.targets ? rows.targets[s] : s;
    if (source >= slots[2] || target < 0 || target >= slots[2])
      throw std::out_of_range("sequence " + std::to_string(s) + " goes from state " + std::to_string(source) + " to " +
                              std::to_string(target) + "; there are " + std::to_string(slots[2]));
  }
  return rows;
}

// sizes: sequences, rows, channels, taps, stride of x.
void conv(int dtype, uintptr_t x, uintptr_t weight, uintptr_t bias, uintptr_t states, uintptr_t out, uintptr_t starts,
          const Sizes& slots, const Sizes& sizes, bool has_silu) {
  check_count(sizes, 5);
  const ConvArgs a{DType(dtype), at<const void>(x), at<const void>(weight), at<const void>(bias), at<void>(states),
                   at<void>(out), rows_of(starts, sizes[0], sizes[1], slots), sizes[2], sizes[3], sizes[4], has_silu};
  call(kernels().conv, a);
}

// sizes: sequences, rows, channels, size, strides of x, dt, b, c.
void selective_scan(int dtype, uintptr_t x, uintptr_t dt, uintptr_t a_, int b_dtype, uintptr_t b, int c_dtype,
                    uintptr_t c, uintptr_t d, uintptr_t states, uintptr_t out, uintptr_t starts, const Sizes& slots,
                    const Sizes& sizes) {
  check_count(sizes, 8);
  const SelectiveArgs a{DType(dtype), at<const void>(x), at<const float>(dt), at<const float>(a_),
                        {DType(b_dtype), at<const void>(b), sizes[6]}, {DType(c_dtype), at<const void>(c), sizes[7]},
                        at<const float>(d), at<float>(states), at<void>(out),
                        rows_of(starts, sizes[0], sizes[1], slots), sizes[2], sizes[3], sizes[4], sizes[5]};
  call(kernels().selective_scan, a);
}

// sizes: sequences, rows, heads, channels, groups, size, strides of x, dt, b, c.
void ssd_scan(int dtype, uintptr_t x, uintptr_t dt, uintptr_t a_, int b_dtype, uintptr_t b, int c_dtype, uintptr_t c,
              uintptr_t d, uintptr_t states, uintptr_t out, uintptr_t starts, const Sizes& slots, const Sizes& sizes) {
  check_count(sizes, 10);
  const SsdArgs a{DType(dtype), at<const void>(x), at<const float>(dt), at<const float>(a_),
                  {DType(b_dtype), at<const void>(b), sizes[8]}, {DType(c_dtype), at<const void>(c), sizes[9]},
                  at<const float>(d), at<float>(states), at<void>(out), rows_of(starts, sizes[0], sizes[1], slots),
                  sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
  call(kernels().ssd_scan, a);
}

// sizes: sequences, rows, heads, size of values, groups, size, strides of v, q, k, decay, beta.
void delta_rule(int dtype, uintptr_t v, int q_dtype, uintptr_t q, int k_dtype, uintptr_t k, uintptr_t decay,
                uintptr_t beta, uintptr_t states, uintptr_t out, uintptr_t starts, const Sizes& slots,
                const Sizes& sizes) {
  check_count(sizes, 11);
  const DeltaArgs a{DType(dtype), at<const void>(v), {DType(q_dtype), at<const void>(q), sizes[7]},
                    {DType(k_dtype), at<const void>(k), sizes[8]}, at<const float>(decay), at<const float>(beta),
                    at<float>(states), at<void>(out), rows_of(starts, sizes[0], sizes[1], slots), sizes[2], sizes[3],
                    sizes[4], sizes[5], sizes[6], sizes[9], sizes[10]};
  call(kernels().delta_rule, a);
}

// --- vocabulary ------------------------------------------------------------------------------------------------------

void check_ids(const int64_t* ids, int64_t count, int64_t limit, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= limit)
      throw std::out_of_range(std::string(what) + " " + std::to_string(ids[i]) + ": there are " + std::to_string(limit));
}

// sizes: masks, rows of the logits, vocabulary, strides of logits and mask.
void mask_tokens(uintptr_t logits, uintptr_t rows, uintptr_t mask, const Sizes& sizes) {
  check_count(sizes, 5);
  const MaskArgs a{at<float>(logits), at<const int64_t>(rows), at<const uint32_t>(mask), sizes[0], sizes[2], sizes[3],
                   sizes[4]};
  check_ids(a.rows, a.num_rows, sizes[1], "row");
  call(kernels().mask, a);
}

// sizes: rows, vocabulary, stride of the logits.
void most_likely(int dtype, uintptr_t logits, uintptr_t out, uintptr_t is_broken, const Sizes& sizes) {
  check_count(sizes, 3);
  const GreedyArgs a{DType(dtype), at<const void>(logits), at<int64_t>(out), at<bool>(is_broken),
                     sizes[0],     sizes[1],               sizes[2]};
  call(kernels().most_likely, a);
}

// sizes: rows, vocabulary, stride of the logits.
void sample(uintptr_t logits, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p, uintptr_t min_p,
            uintptr_t uniform, uintptr_t out, const Sizes& sizes, bool is_all_greedy, bool needs_filter) {
  check_count(sizes, 3);
  const SampleArgs a{at<const float>(logits), at<const float>(temperature), at<const int64_t>(top_k),
                     at<const float>(top_p), at<const float>(min_p), at<const float>(uniform), at<int64_t>(out),
                     sizes[0], sizes[1], sizes[2], is_all_greedy, needs_filter};
  call(kernels().sample, a);
}

// sizes: rows, vocabulary, stride of the logits, number of the best.
void logprobs(uintptr_t logits, uintptr_t chosen, uintptr_t selected, uintptr_t ranks, uintptr_t top_ids,
              uintptr_t top_logprobs, const Sizes& sizes) {
  check_count(sizes, 4);
  const LogprobArgs a{at<const float>(logits), at<const int64_t>(chosen), at<float>(selected), at<int64_t>(ranks),
                      at<int64_t>(top_ids), at<float>(top_logprobs), sizes[0], sizes[1], sizes[2], sizes[3]};
  check_ids(a.chosen, a.num_rows, a.vocab_size, "token");
  call(kernels().logprobs, a);
}

}  // namespace

void bind_layers(nb::module_& m) {
  m.def("route_experts", &route);
  m.def("head_linear", &head_linear);
  m.def("causal_conv1d", &conv);
  m.def("selective_scan", &selective_scan);
  m.def("ssd_scan", &ssd_scan);
  m.def("gated_delta_rule", &delta_rule);
  m.def("mask_tokens", &mask_tokens);
  m.def("most_likely", &most_likely);
  m.def("sample", &sample);
  m.def("logprobs", &logprobs);
}

}  // namespace quire
