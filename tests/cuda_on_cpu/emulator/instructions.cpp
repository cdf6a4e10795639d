// What the matrix instructions and asynchronous copies of ptx.cuh do: fragment layouts of mma.sync
// and ldmatrix, and when a cp.async lands. Products are exact; sums are float32, rounded after each
// addition in order of k (the GPU's order and rounding differ, by about 1e-7).
#include <bit>
#include <cstring>

#include "internal.h"

namespace cuda_on_cpu {
namespace {

enum class Type { kBf16, kF16, kTf32 };

float from_f16(std::uint32_t half) {
  const std::uint32_t sign = (half & 0x8000) << 16;
  const std::uint32_t exponent = half >> 10 & 31;
  const std::uint32_t mantissa = half & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    return std::copysign(static_cast<float>(mantissa) * 0x1p-24f, sign != 0 ? -1.0f : 1.0f);
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

// Element `half` of a register; tf32 operands lose their low 13 bits.
float element(Type type, std::uint32_t bits, int half) {
  if (type == Type::kTf32) return std::bit_cast<float>(bits & 0xffffe000u);
  const std::uint32_t x = bits >> 16 * half & 0xffff;
  return type == Type::kBf16 ? std::bit_cast<float>(x << 16) : from_f16(x);
}

void mma(Type type, void* const* arguments) {
  const auto of_lane = [&](int lane) -> MmaArguments& {
    return *static_cast<MmaArguments*>(arguments[lane]);
  };
  const int halves = type == Type::kTf32 ? 1 : 2;
  const int depth = type == Type::kTf32 ? 8 : 16;
  float a[16][16];
  float b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < halves; ++half) {
      for (int i = 0; i < 4; ++i) {
        const int column = (lane % 4 + 4 * (i >> 1)) * halves + half;
        a[lane / 4 + 8 * (i & 1)][column] = element(type, of_lane(lane).a[i], half);
      }
      for (int i = 0; i < 2; ++i) {
        b[(lane % 4 + 4 * i) * halves + half][lane / 4] = element(type, of_lane(lane).b[i], half);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i >> 1);
      const int column = 2 * (lane % 4) + (i & 1);
      float& d = of_lane(lane).d[i];
      for (int k = 0; k < depth; ++k) d += a[row][k] * b[k][column];
    }
  }
}

}  // namespace

void mma_bf16(void* const* arguments, std::uint32_t) { mma(Type::kBf16, arguments); }
void mma_f16(void* const* arguments, std::uint32_t) { mma(Type::kF16, arguments); }
void mma_tf32(void* const* arguments, std::uint32_t) { mma(Type::kTf32, arguments); }

void ldmatrix(void* const* arguments, std::uint32_t) {
  const auto of_lane = [&](int lane) -> LdmatrixArguments& {
    return *static_cast<LdmatrixArguments*>(arguments[lane]);
  };
  const int warp_start = current->index - current->lane;
  const LdmatrixArguments& first = of_lane(0);
  for (int matrix = 0; matrix < first.count; ++matrix) {
    for (int row = 0; row < 8; ++row) {
      const LdmatrixArguments& from = of_lane(matrix * 8 + row);
      if (from.address % 16 != 0) fail("ldmatrix: row address %#x is not aligned", from.address);
      const char* p = shared_pointer(from.address);
      for (int column = 0; column < 8; ++column) {
        const int lane = first.transpose ? column * 4 + row / 2 : row * 4 + column / 2;
        const int half = first.transpose ? row % 2 : column % 2;
        race::access(warp_start + lane, p + 2 * column, 2, false);
        std::memcpy(reinterpret_cast<char*>(&of_lane(lane).registers[matrix]) + 2 * half,
                    p + 2 * column, 2);
      }
    }
  }
}

void cp_async(void* to, const void* from, int bytes, int source_bytes) {
  site = __builtin_return_address(0);
  const auto addresses = reinterpret_cast<std::uintptr_t>(to) |
                         (source_bytes > 0 ? reinterpret_cast<std::uintptr_t>(from) : 0);
  if (addresses % static_cast<std::uintptr_t>(bytes) != 0) {
    fail("cp.async: addresses %p, %p are not aligned to %d bytes", to, from, bytes);
  }
  const Fiber::Copy copy{static_cast<char*>(to),
                         static_cast<const char*>(from),
                         bytes,
                         source_bytes,
                         current->copy_group,
                         !chance(laziness)};
  race::begin_async_write(to, static_cast<std::size_t>(bytes), current->index);
  std::memset(copy.to, copy.landed ? 0 : 0xff, static_cast<std::size_t>(bytes));
  if (copy.landed) std::memcpy(copy.to, copy.from, static_cast<std::size_t>(source_bytes));
  current->copies.push_back(copy);
}

void cp_async_commit() { ++current->copy_group; }

void cp_async_wait(int groups_left) {
  std::vector<Fiber::Copy> kept;
  for (const Fiber::Copy& copy : current->copies) {
    if (copy.group >= current->copy_group - groups_left) {
      kept.push_back(copy);
      continue;
    }
    if (!copy.landed) {
      std::memset(copy.to, 0, static_cast<std::size_t>(copy.bytes));
      std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.source_bytes));
    }
    race::end_async_write(copy.to, static_cast<std::size_t>(copy.bytes), current->index);
  }
  current->copies = std::move(kept);
}

}  // namespace cuda_on_cpu
