#pragma once

#include "kernels/cuda/attention_scores.cuh"
#include "kernels/cuda/sm80/additive_exponential_shape.h"

// What forward and backward of the exponential form are made of.
//
// With A = e^2q and B = e^2k, made once for each token of a tile, and x = 1 + A B,
//   tanh(q + k) = 1 - 2 / x    and    s = sum_d w_d - 2 sum_d w_d / x_d.
// Four features share a reciprocal, n/d with d = x1 x2 x3 x4, while |q|, |k| <= 5.5, so that d does
// not overflow; two while they are <= 11. What is beyond is left to the generic kernel.
// Counts per pair and four features: 14 slots of the FMA pipe and one reciprocal, 15 issue slots; by
// twos 14 and two. Operands from shared memory are 16-byte vectors, 9 of them for 16 pairs and four
// features: 4 %.
//
// Blocks of 256 threads, 16 x 16, as in the generic kernel: a thread has 4 x 4 pairs of a tile of 64
// queries by 64 keys, those of Pairs. Exponentials lie in the order of slots (Tile::token_of_slot),
// everything else in the order of tokens.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kPerThread = Tile<float>::kPerThread;
static_assert(kTileTokens == Tile<float>::kTokens && kPerThread == 4);

// |x| up to which four, and two features share a reciprocal: (1 + e^(4 |x|))^4 and (...)^2 must not
// overflow. Numerators are less by 1 / x, so weights may be large.
constexpr float kLimitOfFour = 5.5F;
constexpr float kLimitOfTwo = 11;
constexpr float kLargestWeight = 0x1p20F;
// Values and gradients of the output beyond it would not survive being split into two TF32 numbers.
constexpr float kLargestValue = 0x1p126F;

// The slot of a tile in which a token of it lies.
__device__ __forceinline__ int slot_of_token(int token) { return token / 4 + token % 4 * 16; }

template <typename T>
struct ElementType {
  using type = T;
};

// body(ElementType<T>()): one instantiation of a kernel for the three types, which differ in what
// loads and stores do, once per tile.
template <typename Body>
__device__ __forceinline__ auto with_element(DType dtype, Body body) {
  if (dtype == DType::kFloat32) return body(ElementType<float>());
  if (dtype == DType::kFloat16) return body(ElementType<__half>());
  return body(ElementType<__nv_bfloat16>());
}

// Tokens of one (batch, head) of a tensor whose type is known when the kernel runs.
struct AnyTokens {
  const void* data;
  std::int64_t offset;  // of the first token, in elements
  std::int64_t token_stride;
  std::int64_t dim_stride;
  std::int64_t dims;
  DType dtype;
  bool vectorized;  // four elements may be loaded at once, from any token at multiples of four

  static __device__ __forceinline__ AnyTokens of(const ConstView& view, DType dtype,
                                                 std::int64_t batch, std::int64_t head,
                                                 std::int64_t dims) {
    const std::int64_t offset = batch * view.stride[0] + head * view.stride[1];
    const std::int64_t size = dtype == DType::kFloat32 ? 4 : 2;
    const auto address = reinterpret_cast<std::uintptr_t>(view.data) + offset * size;
    const bool aligned = (address | (view.stride[2] * size)) % (4 * size) == 0;
    return {view.data, offset, view.stride[2],           view.stride[3],
            dims,      dtype,  aligned && view.stride[3] == 1};
  }

  // Elements d ... d + 3 of a token, zeros beyond.
  __device__ __forceinline__ float4 load(std::int64_t token, int d) const {
    float x[4];
    with_element(dtype, [&](auto element) {
      using T = typename decltype(element)::type;
      const T* const from = static_cast<const T*>(data) + offset + token * token_stride;
      if (vectorized && d + 4 <= dims) {
        struct alignas(4 * sizeof(T)) Four {
          T value[4];
        };
        const Four four = *reinterpret_cast<const Four*>(from + d);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = to_acc(four.value[e]);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = d + e < dims ? to_acc(from[(d + e) * dim_stride]) : 0.0F;
      }
    });
    return {x[0], x[1], x[2], x[3]};
  }
};

__device__ __forceinline__ float4 loaded(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}
__device__ __forceinline__ void put(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

__device__ __forceinline__ float largest_of(float4 x) {  // NaN counts as infinite
  const bool numbers = x.x == x.x && x.y == x.y && x.z == x.z && x.w == x.w;
  const float largest = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
  return numbers ? largest : kInfinity<float>;
}

// Copies tokens [begin, end) of the 64 from `first` on to rows of shared memory, zeros for the
// others; with kExponentials e^2x, and in the order of slots. Returns the largest |x| of this
// thread's.
template <int kWidth, bool kExponentials>
__device__ __forceinline__ float stage_tokens(float* to, const AnyTokens& tokens,
                                              std::int64_t first, std::int64_t begin,
                                              std::int64_t end) {
  constexpr int kVectors = kWidth / 4;
  constexpr int kRowsAtOnce = kThreads / kVectors;
  const int thread = static_cast<int>(threadIdx.x);
  const int d = thread % kVectors * 4;
  float largest = 0;
#pragma unroll 4
  for (int row = thread / kVectors; row < kTileTokens; row += kRowsAtOnce) {
    const std::int64_t token = first + row;
    float4 x = {0, 0, 0, 0};
    if (token >= begin && token < end && d < tokens.dims) {
      x = tokens.load(token, d);
      largest = fmaxf(largest, largest_of(x));
      if constexpr (kExponentials) {
        x = {expf(2 * x.x), expf(2 * x.y), expf(2 * x.z), expf(2 * x.w)};
      }
    }
    put(to + (kExponentials ? slot_of_token(row) : row) * ExponentialTile<kWidth>::kStride + d, x);
  }
  return largest;
}

// The weight of one (batch, head) to shared memory, zeros beyond E. Returns whether this thread's
// are too large.
template <int kWidth>
__device__ __forceinline__ bool stage_weight(float* to, const AttentionProblem& p,
                                             std::int64_t batch, std::int64_t head) {
  bool beyond = false;
  const int d = static_cast<int>(threadIdx.x);
  if (d < kWidth) {
    const float w = d < p.head_dim ? with_element(p.dtype,
                                                  [&](auto element) {
                                                    using T = typename decltype(element)::type;
                                                    return Weight<T>::of(p, batch, head).at(d);
                                                  })
                                   : 0.0F;
    beyond = !(fabsf(w) <= kLargestWeight);
    to[d] = w;
  }
  return beyond;
}

// s += sum_d w_d / x_d of a thread's pairs, over `quads` times four features.
template <int kWidth, bool kFour>
__device__ __forceinline__ void add_reciprocals(float (&s)[4][4], const float* queries,
                                                const float* keys, const float* weight, int quads) {
  constexpr int kStride = ExponentialTile<kWidth>::kStride;
  const Thread me = Thread::me();
  const float* const rows = queries + me.row * kStride;
  const float* const columns = keys + me.column * kStride;
#pragma unroll 1
  for (int d = 0; d < 4 * quads; d += 4) {
    const float4 w = loaded(weight + d);
    float4 b[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) b[c] = loaded(columns + 16 * c * kStride + d);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float4 a = loaded(rows + 16 * r * kStride + d);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float x0 = fmaf(a.x, b[c].x, 1.0F);
        const float x1 = fmaf(a.y, b[c].y, 1.0F);
        const float x2 = fmaf(a.z, b[c].z, 1.0F);
        const float x3 = fmaf(a.w, b[c].w, 1.0F);
        const float n01 = fmaf(w.x, x1, w.y * x0);
        const float n23 = fmaf(w.z, x3, w.w * x2);
        const float d01 = x0 * x1;
        const float d23 = x2 * x3;
        if constexpr (kFour) {
          s[r][c] = fmaf(fmaf(n01, d23, n23 * d01), reciprocal_approx(d01 * d23), s[r][c]);
        } else {
          s[r][c] = fmaf(n01, reciprocal_approx(d01), s[r][c]);
          s[r][c] = fmaf(n23, reciprocal_approx(d23), s[r][c]);
        }
      }
    }
  }
}

// sum_d w_d tanh(q_d + k_d) of a thread's pairs.
template <int kWidth>
__device__ __forceinline__ void score_pairs(float (&s)[4][4], const float* queries,
                                            const float* keys, const float* weight,
                                            float weight_sum, int quads, bool by_fours) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[r][c] = 0;
  }
  if (by_fours) {
    add_reciprocals<kWidth, true>(s, queries, keys, weight, quads);
  } else {
    add_reciprocals<kWidth, false>(s, queries, keys, weight, quads);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[r][c] = fmaf(-2.0F, s[r][c], weight_sum);
  }
}

// Bias of a thread's pairs, whatever the type of the mask; whether any of them is allowed.
__device__ __forceinline__ bool load_biases_of_any(float (&bias)[4][4], const AttentionProblem& p,
                                                   std::int64_t batch, std::int64_t head,
                                                   Pairs pairs) {
  return with_element(p.dtype, [&](auto element) {
    return load_biases<typename decltype(element)::type>(bias, p, batch, head, pairs);
  });
}

// x = high + low + an error of 2^-22 |x|, both with the 10 bits of a TF32 number.
struct Split {
  std::uint32_t high;
  std::uint32_t low;
  static __device__ __forceinline__ Split of(float x) {
    const std::uint32_t high = rounded(x);
    return {high, rounded(x - __uint_as_float(high))};
  }

 private:
  static __device__ __forceinline__ std::uint32_t rounded(float x) {
    return (__float_as_uint(x) + 0x1000U) & 0xffffe000U;
  }
};

// A matrix in shared memory: element (outer, inner) is data[outer * outer_stride + inner *
// inner_stride]; `inner` is what a product sums over.
struct Operand {
  const float* data;
  int outer_stride;
  int inner_stride;
};

// product = a b^T of 16 rows of a, from row `first_row` on, and kTiles times 8 rows of b, from
// `first_column` on; of a whole warp. Lane l has rows l / 4 and l / 4 + 8 of columns 8 n + l % 4 * 2
// and the next, in this order. Each product of two numbers is three of TF32. Sums start from zero:
// tensor cores round them towards zero, so the caller adds up long ones.
template <int kTiles>
__device__ __forceinline__ void multiply(float (&product)[kTiles][4], const Operand& a,
                                         int first_row, const Operand& b, int first_column,
                                         int inner) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float* const rows =
      a.data + (first_row + lane / 4) * a.outer_stride + lane % 4 * a.inner_stride;
  const float* const columns =
      b.data + (first_column + lane / 4) * b.outer_stride + lane % 4 * b.inner_stride;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) product[n][e] = 0;
  }
#pragma unroll 2
  for (int k = 0; k < inner; k += 8) {
    std::uint32_t high[4];
    std::uint32_t low[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Split x =
          Split::of(rows[e % 2 * 8 * a.outer_stride + (k + e / 2 * 4) * a.inner_stride]);
      high[e] = x.high;
      low[e] = x.low;
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float* const column = columns + 8 * n * b.outer_stride + k * b.inner_stride;
      const Split y[2] = {Split::of(column[0]), Split::of(column[4 * b.inner_stride])};
      const std::uint32_t b_high[2] = {y[0].high, y[1].high};
      const std::uint32_t b_low[2] = {y[0].low, y[1].low};
      mma_m16n8k8_tf32(product[n], low, b_high);
      mma_m16n8k8_tf32(product[n], high, b_low);
      mma_m16n8k8_tf32(product[n], high, b_high);
    }
  }
}

// Stores elements d ... d + 3 of a token that exist.
__device__ __forceinline__ void store_any(const View& view, DType dtype, std::int64_t batch,
                                          std::int64_t head, std::int64_t token, int d,
                                          std::int64_t dims, const float (&x)[4], int count) {
  with_element(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e < count && d + e < dims) store<T>(view, batch, head, token, d + e, x[e]);
    }
  });
}

}  // namespace torch_selfattn::kernels::cuda::sm80
