// The memory of what lies between two operators of one call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace quire {

class Buffers {
 public:
  explicit Buffers(size_t size) : bytes_(new char[size + 64]), next_(bytes_.get()) {}
  char* take(int64_t size) {
    char* result = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(next_) + 63) & ~uintptr_t(63));
    next_ = result + size;
    return result;
  }
  static size_t padded(int64_t size) { return size_t(size + 63) & ~size_t(63); }

 private:
  std::unique_ptr<char[]> bytes_;
  char* next_;
};

}  // namespace quire
