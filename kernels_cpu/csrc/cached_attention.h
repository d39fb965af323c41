// Attention over a cache of pages, as a part of a layer.
#pragma once
#include "mixing.h"

namespace quire {

// Where keys and values lie, and whom a token sees.
class CachedAttention {
 public:
  // sizes: bytes of an element, query heads, key heads, sizes of a key and of a value, window, chunk.
  CachedAttention(DType dtype, const Sizes& sizes, float scale, float soft_cap, const float* sinks);

  // sizes: blocks, block size; strides: k (block, slot, head), v (block, slot, head).
  void bind(int stored, int64_t k, int64_t v, int64_t k_scales, int64_t v_scales, const Sizes& sizes, const Sizes& strides);
  void check(const Step& step) const;
  // Rows at `token_stride`, the heads of a token one after the other.
  void write(const Turn& turn, const Step& step, const char* heads, int64_t token_stride, bool is_key) const;
  // q at `token_stride` to out [T, Hq, Dv], contiguous.
  void attend(const Turn& turn, const Step& step, const char* q, int64_t token_stride, char* out) const;

  const AttentionArgs& args() const { return args_; }
  int64_t element_size() const { return element_size_; }

 private:
  AttentionArgs args_{};
  int64_t element_size_, num_blocks_ = 0;
};

// A mixing over a cache of keys, and of values or none.
class CachedMixing : public Mixing {
 public:
  // sizes: of `CachedAttention`, then rotated pairs.
  CachedMixing(DType dtype, const Sizes& sizes, float scale, float soft_cap, const float* sinks)
      : cached_(dtype, Sizes(sizes.begin(), sizes.end() - 1), scale, soft_cap, sinks), pairs_(sizes.back()) {}

  void bind_cache(int stored, int64_t k, int64_t v, int64_t k_scales, int64_t v_scales, const Sizes& sizes,
                  const Sizes& strides) {
    cached_.bind(stored, k, v, k_scales, v_scales, sizes, strides);
  }
  void check(const StepPart& part) const override { cached_.check(part_as<Step>(part)); }

 protected:
  CachedAttention cached_;
  int64_t pairs_;
};

}  // namespace quire
