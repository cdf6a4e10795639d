#pragma once

#include <cstdint>

namespace torch_selfattn::loops {

// FMA slots beside one division: what four elements of a vector of pairs take in the additive score
// (csrc/kernels/cpu/score.h).
constexpr int kFmasOfAScore = 9;

struct Loops {
  int vector_bytes;
  // Only FMAs, only divisions (two a round), both.
  float (*arithmetic[3])(std::int64_t rounds);
  float (*read)(const float* data, std::int64_t n);
};

}  // namespace torch_selfattn::loops
