// Which rows of a step a mixer computes together, and where their states lie.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "layers.h"

namespace quire {

using Sizes = std::vector<int64_t>;

template <class T>
static inline T* at(int64_t address) {
  return reinterpret_cast<T*>(uintptr_t(address));
}

// Pieces of a step that do not wait for one another.
struct Pieces {
  Rows rows;

  // begins, ends int32 [S], sources, targets int64 [S]: addresses; S.
  explicit Pieces(const Sizes& one) {
    if (one.size() != 5) throw std::invalid_argument("four addresses and a number");
    rows = {at<const int32_t>(one[0]), at<const int32_t>(one[1]), one[4], at<const int64_t>(one[2]),
            at<const int64_t>(one[3]), 0};
  }

  int64_t check(int64_t num_rows, int64_t num_blocks) const {
    int64_t count = 0;
    for (int64_t s = 0; s < rows.num_sequences; ++s) {
      const int64_t begin = rows.starts[s], end = rows.ends[s];
      if (begin < 0 || end < begin || end > num_rows)
        throw std::out_of_range("a piece of rows " + std::to_string(begin) + " to " + std::to_string(end) + "; there are " +
                                std::to_string(num_rows));
      if (rows.sources[s] >= num_blocks || rows.targets[s] < 0 || rows.targets[s] >= num_blocks)
        throw std::out_of_range("a state goes from block " + std::to_string(rows.sources[s]) + " to " +
                                std::to_string(rows.targets[s]) + "; there are " + std::to_string(num_blocks));
      count += end - begin;
    }
    return count;
  }

  Rows with_stride(int64_t stride) const {
    Rows result = rows;
    result.state_stride = stride;
    return result;
  }
};

}  // namespace quire
