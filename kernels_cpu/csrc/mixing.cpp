// Steps, and attention over a cache, for the parts of layers.
#include "mixing.h"

#include "cached_attention.h"

namespace quire {

Step::Step(int64_t query_start_loc, int64_t seq_lens, int64_t block_table, int64_t slots, const Sizes& sizes)
    : query_start_loc(at<const int32_t>(query_start_loc)), seq_lens(at<const int32_t>(seq_lens)),
      block_table(at<const int32_t>(block_table)), slots(at<const int64_t>(slots)), num_requests(sizes.at(0)),
      max_blocks(sizes.at(2)), table_stride(sizes.at(3)) {
  num_tokens = sizes.at(1);
}

AttentionArgs Step::batch_of(AttentionArgs a, Team* team) const {
  a.query_start_loc = query_start_loc, a.seq_lens = seq_lens, a.block_table = block_table;
  a.num_requests = num_requests, a.table_stride = table_stride;
  a.team = team;
  return a;
}

void Step::check(const AttentionArgs& attention, int64_t num_blocks) const {
  check_batch(batch_of(attention, nullptr), num_tokens, num_blocks, max_blocks);
  check_slots(slots, num_tokens, num_blocks * attention.block_size);
}

Rounds::Rounds(const std::vector<Sizes>& rounds, int64_t num_tokens) {
  this->num_tokens = num_tokens;
  for (const Sizes& round : rounds) pieces.emplace_back(round);
}

int64_t Rounds::check(int64_t num_blocks) const {
  int64_t num_covered = 0;
  for (const Pieces& one : pieces) num_covered += one.check(num_tokens, num_blocks);
  return num_covered;
}

void StateMixing::bind_pages(const Sizes& pages) {
  if (pages.size() != 5) throw std::invalid_argument("two pages, and three sizes");
  pages_ = pages;
}

void StateMixing::run_alone(int64_t x, int64_t out, const Rounds& rounds) const {
  check(rounds);
  nanobind::gil_scoped_release released;
  run({chosen_level(), rounds.num_tokens, nullptr}, rounds, {}, at<const char>(x), at<char>(out));
}

CachedAttention::CachedAttention(DType dtype, const Sizes& sizes, float scale, float soft_cap, const float* sinks) {
  if (sizes.size() != 7) throw std::invalid_argument("seven sizes");
  AttentionArgs& a = args_;
  element_size_ = sizes[0];
  a.dtype = dtype;
  a.num_heads = sizes[1], a.num_kv_heads = sizes[2], a.head_size = sizes[3], a.v_head_size = sizes[4];
  a.q_head_stride = a.head_size, a.out_head_stride = a.v_head_size;
  a.out_token_stride = a.num_heads * a.v_head_size;
  a.window = sizes[5], a.chunk = sizes[6];
  a.scale = scale, a.soft_cap = soft_cap;
  a.sinks = sinks;
}

void CachedAttention::bind(int stored, int64_t k, int64_t v, int64_t k_scales, int64_t v_scales, const Sizes& sizes,
                           const Sizes& strides) {
  if (sizes.size() != 2 || strides.size() != 6) throw std::invalid_argument("two sizes and six strides");
  AttentionArgs& a = args_;
  a.stored = Stored(stored);
  a.k_cache = at<const void>(k), a.v_cache = at<const void>(v);
  a.k_scales = at<const float>(k_scales), a.v_scales = at<const float>(v_scales);
  num_blocks_ = sizes[0], a.block_size = sizes[1];
  a.k_block_stride = strides[0], a.k_slot_stride = strides[1], a.k_head_stride = strides[2];
  a.v_block_stride = strides[3], a.v_slot_stride = strides[4], a.v_head_stride = strides[5];
}

void CachedAttention::check(const Step& step) const { step.check(args_, num_blocks_); }

void CachedAttention::write(const Turn& turn, const Step& step, const char* heads, int64_t token_stride,
                            bool is_key) const {
  const AttentionArgs& a = args_;
  CacheWriteArgs w{};
  w.dtype = a.dtype, w.stored = a.stored, w.element_size = element_size_;
  w.source = heads, w.slots = step.slots;
  w.cache = const_cast<void*>(is_key ? a.k_cache : a.v_cache);
  w.scales = const_cast<float*>(is_key ? a.k_scales : a.v_scales);
  w.num_tokens = turn.rows, w.num_heads = a.num_kv_heads, w.block_size = a.block_size;
  w.head_size = is_key ? a.head_size : a.v_head_size;
  w.token_stride = token_stride, w.head_stride = w.head_size;
  w.block_stride = is_key ? a.k_block_stride : a.v_block_stride;
  w.slot_stride = is_key ? a.k_slot_stride : a.v_slot_stride;
  w.cache_head_stride = is_key ? a.k_head_stride : a.v_head_stride;
  turn.level.kernels->write_cache(w);
}

void CachedAttention::attend(const Turn& turn, const Step& step, const char* q, int64_t token_stride, char* out) const {
  AttentionArgs a = step.batch_of(args_, turn.team);
  a.q = q, a.q_token_stride = token_stride, a.out = out;
  if (!turn.level.kernels->paged_attention(a)) throw std::bad_alloc();
}

}  // namespace quire
