#pragma once

#include <cstdint>

namespace torch_selfattn::loops {

struct Loops {
  int vector_bytes;
  // FMAs; the arithmetic of eight elements of a vector of pairs in the additive score, forward, and
  // forward and backward.
  float (*arithmetic[3])(std::int64_t rounds);
  float (*read)(const float* data, std::int64_t n);
};

}  // namespace torch_selfattn::loops
