#include "kernels/common/philox.h"

#include "catch2_any.h"

namespace k = torch_selfattn::kernels;

// Known answers of Random123 (kat_vectors, philox4x32 10). Our counter is {index, offset} and our
// key is the seed, low words first.
TEST_CASE("philox gives the published known answers") {
  struct Answer {
    std::uint64_t seed, offset, index;
    std::uint32_t value[4];
  };
  const Answer answers[] = {
      {0, 0, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
      {~0ull, ~0ull, ~0ull, {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
      {0x299f31d0a4093822ull,
       0x0370734413198a2eull,
       0x85a308d3243f6a88ull,
       {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
  };
  for (const Answer& answer : answers) {
    const k::PhiloxBlock block = k::philox(answer.seed, answer.offset, answer.index);
    for (int n = 0; n < 4; ++n) REQUIRE(block.value[n] == answer.value[n]);
  }
}

TEST_CASE("dropout keeps a share of 1 - p and none at p = 1") {
  const std::int64_t state[2] = {42, 7};
  const std::int64_t rows = 200;
  const std::int64_t keys = 501;
  for (const double p : {0.1, 0.5, 0.9}) {
    const k::Dropout dropout = k::Dropout::make(p, state);
    std::int64_t kept = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t key = 0; key < keys; ++key) {
        const double factor = dropout.factor(row, key, keys);
        REQUIRE((factor == 0.0 || factor == Approx(1.0 / (1.0 - p))));
        kept += factor != 0.0;
      }
    }
    const double total = static_cast<double>(rows * keys);
    const double sigma = std::sqrt(total * p * (1.0 - p));
    REQUIRE(std::abs(static_cast<double>(kept) - total * (1.0 - p)) < 5.0 * sigma);
  }
  const k::Dropout all = k::Dropout::make(1.0, state);
  for (std::int64_t key = 0; key < keys; ++key) REQUIRE(all.factor(0, key, keys) == 0.0);
}
