#pragma once

#include <cstdint>

#include "kernels/common/macros.h"

// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011). The same (seed, offset, element) gives the same number on every device, in
// forward and in backward, so dropout needs no stored mask.
namespace torch_selfattn::kernels {

struct PhiloxBlock {
  std::uint32_t value[4];
};

TSA_HOST_DEVICE PhiloxBlock philox(std::uint64_t seed, std::uint64_t offset, std::uint64_t index) {
  std::uint32_t c0 = static_cast<std::uint32_t>(index);
  std::uint32_t c1 = static_cast<std::uint32_t>(index >> 32);
  std::uint32_t c2 = static_cast<std::uint32_t>(offset);
  std::uint32_t c3 = static_cast<std::uint32_t>(offset >> 32);
  std::uint32_t k0 = static_cast<std::uint32_t>(seed);
  std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(0xD2511F53u) * c0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
    const std::uint32_t n0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    const std::uint32_t n2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Dropout of attention weights. One Philox block serves the four keys 4n … 4n+3 of a row.
struct Dropout {
  std::uint64_t seed = 0;
  std::uint64_t offset = 0;
  std::uint32_t threshold = 0;  // keep where the random number is >= threshold = p * 2^32
  bool drop_all = false;        // p = 1
  double keep_scale = 1.0;      // 1 / (1 - p), 0 if p = 1

  static TSA_HOST_DEVICE Dropout make(double p, const std::int64_t* philox_state) {
    Dropout d;
    d.seed = static_cast<std::uint64_t>(philox_state[0]);
    d.offset = static_cast<std::uint64_t>(philox_state[1]);
    d.drop_all = p >= 1.0;
    const double scaled = p * 4294967296.0;
    d.threshold = scaled >= 4294967295.0 ? 4294967295u : static_cast<std::uint32_t>(scaled);
    d.keep_scale = d.drop_all ? 0.0 : 1.0 / (1.0 - p);
    return d;
  }

  // row = (b * H + h) * Lq + i. Blocks of a row are numbered from row * ceil(Lk / 4).
  static TSA_HOST_DEVICE std::uint64_t block_index(std::int64_t row, std::int64_t key,
                                                   std::int64_t key_length) {
    return static_cast<std::uint64_t>(row) * static_cast<std::uint64_t>((key_length + 3) / 4) +
           static_cast<std::uint64_t>(key / 4);
  }
  TSA_HOST_DEVICE bool keep(std::uint32_t random) const { return !drop_all && random >= threshold; }

  // 1/(1-p) for a kept weight, 0 for a dropped one; one Philox block per call, so loops over keys
  // use block_index and keep themselves.
  TSA_HOST_DEVICE double factor(std::int64_t row, std::int64_t key, std::int64_t key_length) const {
    const PhiloxBlock block = philox(seed, offset, block_index(row, key, key_length));
    return keep(block.value[key % 4]) ? keep_scale : 0.0;
  }
};

}  // namespace torch_selfattn::kernels
