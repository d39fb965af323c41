// What only the contents of a step can tell: a wrong index would read or write outside the cache.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace quire {

// Finding it costs less than a thousandth of the attention.
inline void check_batch(const AttentionArgs& a, int64_t num_tokens, int64_t num_blocks, int64_t max_blocks) {
  if (a.query_start_loc[0] != 0 || a.query_start_loc[a.num_requests] != num_tokens)
    throw std::invalid_argument("query_start_loc must start with 0 and end with the number of rows of q");
  for (int64_t r = 0; r < a.num_requests; ++r) {
    const int64_t num_new = a.query_start_loc[r + 1] - a.query_start_loc[r];
    if (num_new < 0) throw std::invalid_argument("query_start_loc decreases at request " + std::to_string(r));
    if (num_new == 0) continue;
    if (a.seq_lens[r] < num_new || a.seq_lens[r] > max_blocks * a.block_size)
      throw std::invalid_argument("seq_lens[" + std::to_string(r) + "] = " + std::to_string(a.seq_lens[r]) +
                                  " is less than its new tokens or more than its row of block_table holds");
    const int64_t first_position = a.seq_lens[r] - num_new;
    int64_t first_key = a.window > 0 && first_position >= a.window ? first_position - a.window + 1 : 0;
    if (a.chunk > 0 && first_position / a.chunk * a.chunk > first_key)
      first_key = first_position / a.chunk * a.chunk;
    for (int64_t b = first_key / a.block_size; b * a.block_size < a.seq_lens[r]; ++b) {
      const int64_t block = a.block_table[r * a.table_stride + b];
      if (block < 0 || block >= num_blocks)
        throw std::out_of_range("block_table[" + std::to_string(r) + ", " + std::to_string(b) + "] = " +
                                std::to_string(block) + " but the cache has " + std::to_string(num_blocks) + " blocks");
    }
  }
}

inline void check_slots(const int64_t* slots, int64_t num_tokens, int64_t num_slots) {
  for (int64_t token = 0; token < num_tokens; ++token)
    if (slots[token] < 0 || slots[token] >= num_slots)
      throw std::out_of_range("slot_mapping[" + std::to_string(token) + "] = " + std::to_string(slots[token]) +
                              " but the cache has " + std::to_string(num_slots) + " slots");
}

}  // namespace quire
