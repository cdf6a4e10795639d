#pragma once

#include "kernels/cuda/attention_scores.cuh"
#include "kernels/cuda/sm80/additive_exponential_shape.h"

// What forward and backward of the exponential form are made of.
//
// With A = e^2q and B = e^2k, made once for each token of a tile, and x = 1 + A B,
//   tanh(q + k) = 1 - 2 / x    and    s = sum_d w_d - 2 sum_d w_d / x_d.
// Four features share a reciprocal, n/d with d = x1 x2 x3 x4, while that does not overflow, else
// two, else none: Sharing. What is beyond is left to the generic kernel. Counts per pair and four
// features: 14 slots of the FMA pipe and one reciprocal, 15 issue slots; by twos 14 and two, by
// ones 8 and four, of which the latter bound. Operands from shared memory are 16-byte vectors, 9 of
// them for 16 pairs and four features: 4 %.
//
// Blocks of 256 threads, 16 x 16, as in the generic kernel: a thread has 4 x 4 pairs of a tile of
// 64 queries by 64 keys, those of Pairs. Exponentials lie in the order of slots
// (Tile::token_of_slot), everything else in the order of tokens.
namespace torch_selfattn::kernels::cuda::sm80 {

// Addresses are computed where they are used, from a thread index that is read there: hoisted out
// of loops they would take the registers that those need.
__device__ __forceinline__ Thread thread_here() {
  const int thread = thread_index_here();
  return {thread / 16, thread % 16};
}

static_assert(kTileTokens == Tile<float>::kTokens && Tile<float>::kPerThread == 4);

// Numerators are less than denominators by 1 / x, so weights may be large.
constexpr float kLargestWeight = 0x1p20F;

__device__ __forceinline__ Sharing sharing_of(float largest_query, float largest_key) {
  const float sum = largest_query + largest_key;
  if (sum <= 11) return Sharing::kFour;
  return sum <= 22 ? Sharing::kTwo : Sharing::kOne;
}

// The slot of a tile in which a token of it lies.
__device__ __forceinline__ int slot_of_token(int token) { return token / 4 + token % 4 * 16; }

template <typename T>
struct ElementType {
  using type = T;
};

// body(ElementType<T>()): one instantiation of a kernel for the three types, which differ in what
// is loaded and stored once.
template <typename Body>
__device__ __forceinline__ auto with_element(DType dtype, Body body) {
  if (dtype == DType::kFloat32) return body(ElementType<float>());
  if (dtype == DType::kFloat16) return body(ElementType<__half>());
  return body(ElementType<__nv_bfloat16>());
}

__device__ __forceinline__ float4 loaded(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}
__device__ __forceinline__ void put(float* to, float4 x) { *reinterpret_cast<float4*>(to) = x; }

// Starts to copy a tile of a prepared tensor to rows of shared memory.
template <int kWidth>
__device__ __forceinline__ void copy_tile(float* to, const float* from, int columns) {
  constexpr int kVectors = kWidth / 4;
  const int thread = thread_index_here();
  const int d = thread % kVectors * 4;
  if (d >= columns) return;
#pragma unroll
  for (int row = thread / kVectors; row < kTileTokens; row += kThreads / kVectors) {
    cp_async16(to + row * ExponentialTile<kWidth>::kStride + d, from + row * columns + d);
  }
}

// Whether one of this thread's share of a row's tiles [first, end) is beyond the range.
template <typename Index>
__device__ __forceinline__ bool any_beyond(const PreparedTensor& tensor, Index row, Index first,
                                           Index end) {
  bool beyond = false;
  for (Index n = first + thread_index_here(); n < end; n += kThreads) {
    beyond = beyond || tensor.largest_of(row, n) == kInfinity<float>;
  }
  return beyond;
}

// The weight of one (batch, head) to shared memory, zeros beyond E. Returns whether this thread's
// are too large.
template <int kWidth>
__device__ __forceinline__ bool stage_weight(float* to, const AttentionProblem& p,
                                             std::int64_t batch, std::int64_t head) {
  const int d = static_cast<int>(threadIdx.x);
  if (d >= kWidth) return false;
  float w = 0;
  if (d < p.head_dim) {
    with_element(p.dtype, [&](auto element) {
      w = Weight<typename decltype(element)::type>::of(p, batch, head).at(d);
    });
  }
  to[d] = w;
  return !(fabsf(w) <= kLargestWeight);
}

// s += sum_d w_d / x_d of a thread's pairs, over `quads` times four features.
template <int kWidth, Sharing kSharing>
__device__ __forceinline__ void add_reciprocals(float (&s)[4][4], const float* queries,
                                                const float* keys, const float* weight, int quads) {
  constexpr int kStride = ExponentialTile<kWidth>::kStride;
  const Thread me = thread_here();
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
        if constexpr (kSharing == Sharing::kOne) {
          s[r][c] = fmaf(w.x, reciprocal_approx(x0), s[r][c]);
          s[r][c] = fmaf(w.y, reciprocal_approx(x1), s[r][c]);
          s[r][c] = fmaf(w.z, reciprocal_approx(x2), s[r][c]);
          s[r][c] = fmaf(w.w, reciprocal_approx(x3), s[r][c]);
          continue;
        }
        const float n01 = fmaf(w.x, x1, w.y * x0);
        const float n23 = fmaf(w.z, x3, w.w * x2);
        const float d01 = x0 * x1;
        const float d23 = x2 * x3;
        if constexpr (kSharing == Sharing::kFour) {
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
                                            float weight_sum, int quads, Sharing sharing) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[r][c] = 0;
  }
  if (sharing == Sharing::kFour) {
    add_reciprocals<kWidth, Sharing::kFour>(s, queries, keys, weight, quads);
  } else if (sharing == Sharing::kTwo) {
    add_reciprocals<kWidth, Sharing::kTwo>(s, queries, keys, weight, quads);
  } else {
    add_reciprocals<kWidth, Sharing::kOne>(s, queries, keys, weight, quads);
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) s[r][c] = fmaf(-2.0F, s[r][c], weight_sum);
  }
}

// Which pairs of a tile there are.
enum class Pattern : std::uint8_t {
  kPlain,  // all of them, without a bias
  kSome,   // each has to be looked at
  kNone
};

__device__ __forceinline__ Pattern pattern_of(const AttentionProblem& p, std::int64_t batch,
                                              std::int64_t first_query, std::int64_t first_key) {
  const std::int64_t end_query = first_query + kTileTokens;
  const std::int64_t end_key = first_key + kTileTokens;
  const bool whole = p.mask_kind == MaskKind::kNone && p.slopes == nullptr &&
                     end_query <= p.query_length && end_key <= p.key_length;
  if (p.window_left < 0 && p.window_right < 0 && p.key_starts == nullptr &&
      p.key_lengths == nullptr) {
    return whole ? Pattern::kPlain : Pattern::kSome;
  }
  const KeyRange first = key_range(p, batch, first_query);
  const KeyRange last = key_range(p, batch, min(end_query, p.query_length) - 1);
  if (first.begin >= end_key || last.end <= first_key) return Pattern::kNone;
  return whole && last.begin <= first_key && first.end >= end_key ? Pattern::kPlain
                                                                  : Pattern::kSome;
}

// Bias of a thread's pairs, whatever the type of the mask; whether any of them is allowed.
__device__ __forceinline__ bool load_biases_of_any(float (&bias)[4][4], const AttentionProblem& p,
                                                   std::int64_t batch, std::int64_t head,
                                                   Pairs pairs) {
  return with_element(p.dtype, [&](auto element) {
    return load_biases<typename decltype(element)::type>(bias, p, batch, head, pairs);
  });
}

// The scores of a thread's pairs from sums over features, -inf for pairs that are not allowed.
__device__ __forceinline__ void finish_scores_of_any(float (&s)[4][4], const AttentionProblem& p,
                                                     std::int64_t batch, std::int64_t head,
                                                     Pairs pairs, bool plain) {
  const float scale = static_cast<float>(p.scale);
  if (plain) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) s[r][c] *= scale;  // bounded, as weights and scale are
    }
    return;
  }
  float bias[4][4];
  load_biases_of_any(bias, p, batch, head, pairs);
  finish_scores(s, bias, scale);
}

// e^x, with an error of 6e-8 |x|: relative to 1, no more than that of a float32 number where x <=
// 0, and that of the score itself where BoundedSoftmax lets x be up to 40. exp() would take three
// times as long.
__device__ __forceinline__ float exponential_of_difference(float x) {
  return exp2_approx(x * 1.44269504F);
}

// x = high + low, as TF32 numbers, of which tensor cores see the first 10 bits. Products leave out
// low times low, which is up to 2^-20 of the product and of its sign where high is cut off, and up
// to 2^-22 of either sign where it is rounded, for one more instruction.
template <bool kRounded>
struct Split {
  std::uint32_t high;
  std::uint32_t low;
  static __device__ __forceinline__ Split of(float x) {
    const std::uint32_t high = (__float_as_uint(x) + (kRounded ? 0x1000U : 0U)) & 0xffffe000U;
    return {high, __float_as_uint(x - __uint_as_float(high)) + 0x1000U};
  }
};

// A matrix in shared memory: element (outer, inner) is data[outer * outer_stride + inner *
// inner_stride]; `inner` is what a product sums over.
struct Operand {
  const float* data;
  int outer_stride;
  int inner_stride;
};

// What is known of the numbers of two operands: float32, or TF32 numbers, as those of 16 bits are;
// and whether float32 numbers are rounded where they are split.
enum class Precision : std::uint8_t { kRounded, kFull, kShortColumns, kShort };

// product = a b^T of 16 rows of a, from row `first_row` on, and kTiles times 8 rows of b, from
// `first_column` on; of a whole warp. Lane l has rows l / 4 and l / 4 + 8 of columns 8 n + l % 4 *
// 2 and the next, in this order. Each product of two numbers is three of TF32, or two where those
// of b are TF32 numbers, or one. Sums start from zero: tensor cores round them towards zero, so the
// caller adds up long ones.
template <Precision kPrecision, int kTiles>
__device__ __forceinline__ void multiply(float (&product)[kTiles][4], const Operand& a,
                                         int first_row, const Operand& b, int first_column,
                                         int inner) {
  using Part = Split<kPrecision == Precision::kRounded>;
  constexpr bool kFull = kPrecision == Precision::kRounded || kPrecision == Precision::kFull;
  const int lane = thread_index_here() % 32;
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
      const float x = rows[e % 2 * 8 * a.outer_stride + (k + e / 2 * 4) * a.inner_stride];
      const Part split = Part::of(x);
      high[e] = kPrecision == Precision::kShort ? __float_as_uint(x) : split.high;
      low[e] = split.low;
    }
    std::uint32_t b_high[kTiles][2];
    std::uint32_t b_low[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float* const column = columns + 8 * n * b.outer_stride + k * b.inner_stride;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float y = column[4 * e * b.inner_stride];
        const Part split = Part::of(y);
        b_high[n][e] = kFull ? split.high : __float_as_uint(y);
        b_low[n][e] = split.low;
      }
    }
    // One after another of the same sum would wait for the one before.
    if constexpr (kPrecision != Precision::kShort) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_m16n8k8_tf32(product[n], low, b_high[n]);
    }
    if constexpr (kFull) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_m16n8k8_tf32(product[n], high, b_low[n]);
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_m16n8k8_tf32(product[n], high, b_high[n]);
  }
}

// The same where only the inputs' dtype tells: kPrecision of float32, kShortPrecision of 16 bits.
template <Precision kPrecision, Precision kShortPrecision, int kTiles>
__device__ __forceinline__ void multiply(float (&product)[kTiles][4], const Operand& a,
                                         int first_row, const Operand& b, int first_column,
                                         int inner, DType dtype) {
  if (dtype == DType::kFloat32) {
    multiply<kPrecision>(product, a, first_row, b, first_column, inner);
  } else {
    multiply<kShortPrecision>(product, a, first_row, b, first_column, inner);
  }
}

// Stores elements d ... d + count - 1 of a token that exist.
template <int count>
__device__ __forceinline__ void store_any(const View& view, DType dtype, std::int64_t batch,
                                          std::int64_t head, std::int64_t token, int d,
                                          std::int64_t dims, const float (&x)[count]) {
  with_element(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
#pragma unroll
    for (int e = 0; e < count; ++e) {
      if (d + e < dims) store<T>(view, batch, head, token, d + e, x[e]);
    }
  });
}

}  // namespace torch_selfattn::kernels::cuda::sm80
