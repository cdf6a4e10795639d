#pragma once

#include <cstdint>

namespace torch_selfattn::kernels::cuda::sm80 {

// Hands out parts of a workspace, each aligned to 16 bytes. Without memory it only counts.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(std::int64_t count) {
    char* const begin = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += (count * static_cast<std::int64_t>(sizeof(T)) + 15) / 16 * 16;
    return reinterpret_cast<T*>(begin);
  }
  std::int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  std::int64_t bytes_ = 0;
};

}  // namespace torch_selfattn::kernels::cuda::sm80
