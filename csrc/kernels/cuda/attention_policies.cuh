#pragma once

#include "kernels/common/philox.h"
#include "kernels/cuda/numbers.cuh"

// What all attention kernels share, whatever their tiles: the weight of the additive score, which
// pairs are allowed, mask, ALiBi, and how these join the score.
namespace torch_selfattn::kernels::cuda {

template <typename T>
struct Weight {  // of one (batch, head)
  const T* data;
  std::int64_t stride;
  Accumulator<T> negative_slope;  // of the activation, if that is leaky ReLU
  static __device__ __forceinline__ Weight of(const AttentionProblem& p, std::int64_t batch,
                                              std::int64_t head) {
    return {
        static_cast<const T*>(p.weight) + batch * p.weight_stride[0] + head * p.weight_stride[1],
        p.weight_stride[2], static_cast<Accumulator<T>>(p.negative_slope)};
  }
  __device__ __forceinline__ Accumulator<T> at(std::int64_t d) const {
    return to_acc(data[d * stride]);
  }
};

// The bias of a pair, -inf for one that is not allowed. The kind of mask is uniform over the grid
// and costs a branch per score, beside head_dim FMAs: no instantiations for it.
template <typename T>
__device__ __forceinline__ Accumulator<T> mask_bias(const AttentionProblem& p, std::int64_t batch,
                                                    std::int64_t head, std::int64_t i,
                                                    std::int64_t j) {
  using Acc = Accumulator<T>;
  if (p.mask_kind == MaskKind::kNone) return 0;
  const std::int64_t index = batch * p.mask.stride[0] + head * p.mask.stride[1] +
                             i * p.mask.stride[2] + j * p.mask.stride[3];
  if (p.mask_kind == MaskKind::kBool) {
    return static_cast<const unsigned char*>(p.mask.data)[index] != 0 ? Acc(0) : -kInfinity<Acc>;
  }
  if (p.mask_dtype != p.dtype) return static_cast<const float*>(p.mask.data)[index];
  return to_acc(static_cast<const T*>(p.mask.data)[index]);
}

// Scores are kept within +-2^127 (float64: 2^1023): differences of two are never inf - inf, and a
// mask of finfo.min is an ordinary number. A NaN stays one.
__device__ __forceinline__ float limit_score(float s) {
  return s > 0x1p127f ? 0x1p127f : s < -0x1p127f ? -0x1p127f : s;
}
__device__ __forceinline__ double limit_score(double s) {
  return s > 0x1p1023 ? 0x1p1023 : s < -0x1p1023 ? -0x1p1023 : s;
}

// The pairs of a tile that a thread has are given by a struct
//   query, key                        the first query and the first key
//   query_step(q), key_step(k)        how far its q-th query and its k-th key are from these

// ALiBi: the distances |position - j| of a thread's pairs. The first one is the only 64-bit number;
// the others differ from it by less than a tile.
template <typename Acc>
struct Distances {
  Acc first;
  template <typename Pairs>
  static __device__ __forceinline__ Distances of(const AttentionProblem& p, std::int64_t batch,
                                                 Pairs pairs) {
    return {static_cast<Acc>(query_position(p, batch, pairs.query) - pairs.key)};
  }
  __device__ __forceinline__ Acc at(int query_step, int key_step) const {
    return fabs(first + static_cast<Acc>(query_step - key_step));
  }
};

// The slope of a head; a problem without slopes has none.
template <typename T>
__device__ __forceinline__ Accumulator<T> slope_of(const AttentionProblem& p, std::int64_t batch,
                                                   std::int64_t head) {
  const std::int64_t index = batch * p.slopes_stride[0] + head * p.slopes_stride[1];
  if (p.slopes_dtype != p.dtype) return static_cast<const float*>(p.slopes)[index];
  return to_acc(static_cast<const T*>(p.slopes)[index]);
}

// Fills `bias`, mask and ALiBi, and says whether any of the thread's pairs is allowed.
template <typename T, typename Acc, int Q, int K, typename Pairs>
__device__ __forceinline__ bool load_biases(Acc (&bias)[Q][K], const AttentionProblem& p,
                                            std::int64_t batch, std::int64_t head, Pairs pairs) {
  bool any = false;
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const std::int64_t i = pairs.query + pairs.query_step(q);
    const KeyRange range = i < p.query_length ? key_range(p, batch, i) : KeyRange{0, 0};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const std::int64_t j = pairs.key + pairs.key_step(k);
      const Acc x =
          j >= range.begin && j < range.end ? mask_bias<T>(p, batch, head, i, j) : -kInfinity<Acc>;
      bias[q][k] = x;
      any = any || x != -kInfinity<Acc>;
    }
  }
  if (p.slopes != nullptr) {  // uniform over the grid
    const Acc slope = slope_of<T>(p, batch, head);
    const auto distances = Distances<Acc>::of(p, batch, pairs);
#pragma unroll
    for (int q = 0; q < Q; ++q) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (bias[q][k] == -kInfinity<Acc>) continue;  // limited, a bias is never that
        bias[q][k] =
            limit_score(bias[q][k] - slope * distances.at(pairs.query_step(q), pairs.key_step(k)));
      }
    }
  }
  return any;
}

// scale * s + bias for pairs that are allowed, -inf for the others.
template <typename Acc, int Q, int K>
__device__ __forceinline__ void finish_scores(Acc (&s)[Q][K], const Acc (&bias)[Q][K], Acc scale) {
#pragma unroll
  for (int r = 0; r < Q; ++r) {
#pragma unroll
    for (int c = 0; c < K; ++c) {
      s[r][c] = bias[r][c] == -kInfinity<Acc>
                    ? -kInfinity<Acc>
                    : limit_score(limit_score(scale * s[r][c]) + bias[r][c]);
    }
  }
}

// The keys that any of the queries [first, first + count) may attend to.
__device__ __forceinline__ KeyRange key_range_of_tile(const AttentionProblem& p, std::int64_t batch,
                                                      std::int64_t first, int count) {
  const std::int64_t last =
      first + count <= p.query_length ? first + count - 1 : p.query_length - 1;
  return {key_range(p, batch, first).begin, key_range(p, batch, last).end};
}

}  // namespace torch_selfattn::kernels::cuda
