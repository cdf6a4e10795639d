#pragma once

#include "kernels/cuda/attention_policies.cuh"
#include "kernels/cuda/attention_tile.cuh"

// The scores as policies, and what else depends on the tiles of the generic kernels.
//
// A policy has
//   score_tile           s[row][column] without scale; returns a note for accumulate_gradient
//   accumulate_gradient  adds what the tile of g[row][column] gives the row side, without scale
// Both scores are symmetric in query and key, so the same function gives dq and dk.
namespace torch_selfattn::kernels::cuda {

struct DotScore {
  static constexpr bool kHasWeight = false;

  template <typename T, typename Acc, int R>
  static __device__ __forceinline__ bool score_tile(Acc (&s)[R][R], const Side<T>& rows,
                                                    const Side<T>& columns,
                                                    const Weight<T>& /*weight*/, std::int64_t dims,
                                                    const Shared<Acc>& shared) {
    product_tile(s, rows, columns, dims, shared);
    return false;
  }

  template <typename T, typename Acc, int R>
  static __device__ __forceinline__ void accumulate_gradient(
      Acc (&acc)[R][2 * R], Acc (& /*acc_weight*/)[2 * R], bool /*weight_gradient*/,
      const Side<T>& /*rows*/, const Side<T>& columns, const Weight<T>& /*weight*/,
      std::int64_t dim, std::int64_t dims, bool /*note*/, const Shared<Acc>& shared) {
    accumulate_tile(acc, columns, dim, dims, shared);
  }
};

// Features [first, first + R) of the weight and of a token, 0 beyond `dims` and outside of the
// side.
template <typename T, typename Acc, int R>
__device__ __forceinline__ void load_weights(Acc (&to)[R], const Weight<T>& weight,
                                             std::int64_t first, std::int64_t dims) {
#pragma unroll
  for (int e = 0; e < R; ++e) to[e] = first + e < dims ? weight.at(first + e) : Acc(0);
}
template <typename T, typename Acc, int R>
__device__ __forceinline__ void load_features(Acc (&to)[R], const Side<T>& side, std::int64_t token,
                                              std::int64_t first, std::int64_t dims) {
  const bool inside = token >= side.begin && token < side.end;
  const T* const from = side.tokens.data + token * side.tokens.token_stride;
#pragma unroll
  for (int e = 0; e < R; ++e) {
    const std::int64_t d = first + e;
    to[e] = inside && d < dims ? to_acc(from[d * side.tokens.dim_stride]) : Acc(0);
  }
}

__device__ __forceinline__ float reciprocal(float x) { return reciprocal_approx(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

// Absolute error as that of the exponential form, 1e-7 in float32, for numbers of any size; a tenth
// of the instructions of tanh().
__device__ __forceinline__ float tanh_of_any(float x) {
  const float e = expf(-2 * fabsf(x));
  return copysignf((1 - e) * reciprocal(1 + e), x);
}
__device__ __forceinline__ double tanh_of_any(double x) {
  const double e = exp(-2 * fabs(x));
  return copysign((1 - e) * reciprocal(1 + e), x);
}

// sum_d w_d tanh(q_d + k_d). With A = e^2q and B = e^2k, made while staging, and u = A B:
//   tanh = 1 - 2 r, r = 1 / (1 + u), and its derivative is 4 u r^2.
// Two features share a reciprocal: w1/x1 + w2/x2 = (w1 x2 + w2 x1) / (x1 x2). That is finite while
// |q|, |k| <= kLimit; a tile with a number beyond takes tanh_of_any. Costs per score and feature:
// 3 FMA slots and half a reciprocal; the bound is the sum of both pipes.
struct AdditiveScore {
  static constexpr bool kHasWeight = true;

  // x1 x2 <= (1 + e^(4 limit))^2 must not overflow.
  template <typename Acc>
  static constexpr Acc kLimit = std::is_same_v<Acc, double> ? Acc(88) : Acc(11);

  struct Exponential {
    __device__ __forceinline__ float operator()(float x) const { return expf(2 * x); }
    __device__ __forceinline__ double operator()(double x) const { return exp(2 * x); }
  };

  // s += sum_d w_d r(row, column, d), over staged exponentials.
  template <typename Acc, int R>
  static __device__ __forceinline__ void add_reciprocals(Acc (&s)[R][R], const Acc* rows,
                                                         const Acc* columns, const Acc* weight,
                                                         int depth) {
    constexpr int kStride = Tile<Acc>::kDepthStride;
    const Thread me = Thread::me();
#pragma unroll 1
    for (int d = 0; d < depth; d += R) {
      const Vector<Acc> w = Vector<Acc>::load(weight + d);
      Vector<Acc> b[R];
#pragma unroll
      for (int c = 0; c < R; ++c) {
        b[c] = Vector<Acc>::load(columns + (me.column + 16 * c) * kStride + d);
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Vector<Acc> a = Vector<Acc>::load(rows + (me.row + 16 * r) * kStride + d);
#pragma unroll
        for (int c = 0; c < R; ++c) {
#pragma unroll
          for (int v = 0; v < R; v += 2) {
            const Acc x1 = 1 + a.value[v] * b[c].value[v];
            const Acc x2 = 1 + a.value[v + 1] * b[c].value[v + 1];
            const Acc numerator = w.value[v] * x2 + w.value[v + 1] * x1;
            s[r][c] += numerator * reciprocal(x1 * x2);
          }
        }
      }
    }
  }

  // s += sum_d w_d tanh(row_d + column_d), over staged numbers.
  template <typename Acc, int R>
  static __device__ __forceinline__ void add_tanh(Acc (&s)[R][R], const Acc* rows,
                                                  const Acc* columns, const Acc* weight,
                                                  int depth) {
    constexpr int kStride = Tile<Acc>::kDepthStride;
    const Thread me = Thread::me();
#pragma unroll 1
    for (int d = 0; d < depth; ++d) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Acc a = rows[(me.row + 16 * r) * kStride + d];
#pragma unroll
        for (int c = 0; c < R; ++c) {
          s[r][c] += weight[d] * tanh_of_any(a + columns[(me.column + 16 * c) * kStride + d]);
        }
      }
    }
  }

  // Returns whether one of the numbers was beyond the limit, or a weight not finite.
  template <typename T, typename Acc, int R>
  static __device__ __forceinline__ bool score_tile(Acc (&s)[R][R], const Side<T>& rows,
                                                    const Side<T>& columns, const Weight<T>& weight,
                                                    std::int64_t dims, const Shared<Acc>& shared) {
    using Shape = Tile<Acc>;
    Acc* const column_operand = shared.staging + Shape::kTokens * Shape::kDepthStride;
    const int thread = static_cast<int>(threadIdx.x);
    // Sums of w r become sums of w tanh in the end: weight_sum - 2 sum. What is a sum of
    // w tanh already is counted by -1/2.
    Acc weight_sum = 0;
    bool any_beyond = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < R; ++c) s[r][c] = 0;
    }
    for (std::int64_t dim = 0; dim < dims; dim += Shape::kDepth) {
      const int depth = dims - dim < Shape::kDepth ? static_cast<int>(dims - dim) : Shape::kDepth;
      const auto stage_both = [&](auto transform, Acc weight_factor) {
        bool beyond = stage<Shape::kTokens, Shape::kDepth, Shape::kDepthStride>(
            shared.staging, rows, 0, dim, dims, kLimit<Acc>, transform);
        beyond |= stage<Shape::kTokens, Shape::kDepth, Shape::kDepthStride>(
            column_operand, columns, 0, dim, dims, kLimit<Acc>, transform);
        if (thread < Shape::kDepth) {
          const Acc w = thread < depth ? weight.at(dim + thread) : Acc(0);
          shared.weight[thread] = weight_factor * w;
          beyond |= !(fabs(w) <= kLargest<Acc>);
        }
        return beyond;
      };
      __syncthreads();
      if (__syncthreads_or(stage_both(Exponential(), 1)) == 0) {
        add_reciprocals(s, shared.staging, column_operand, shared.weight, depth);
        for (int d = 0; d < depth; ++d) weight_sum += shared.weight[d];
      } else {
        any_beyond = true;
        __syncthreads();
        stage_both(Identity(), Acc(-0.5));
        __syncthreads();
        add_tanh(s, shared.staging, column_operand, shared.weight, depth);
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < R; ++c) s[r][c] = weight_sum - 2 * s[r][c];
    }
    return any_beyond;
  }

  // acc[r][d] += sum_column g w_d (1 - tanh^2), acc_weight[d] += sum g tanh, g from the tile in
  // shared memory, over the staged columns. The row side comes from global memory, once for kStaged
  // columns.
  template <bool weight_gradient, bool beyond, typename T, typename Acc, int R>
  static __device__ __forceinline__ void add_slopes(Acc (&acc)[R][2 * R], Acc (&acc_weight)[2 * R],
                                                    const Side<T>& rows, const Weight<T>& weight,
                                                    std::int64_t dim, std::int64_t dims,
                                                    int first_slot, const Shared<Acc>& shared) {
    using Shape = Tile<Acc>;
    const Thread me = Thread::me();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * 16 * R >= dims - dim) break;
      const int column = (me.column + 16 * half) * R;
      Acc w[R];
      load_weights(w, weight, dim + column, dims);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        Acc row[R];
        Acc w4_row[R];
        load_features(row, rows, rows.first + me.row * R + r, dim + column, dims);
#pragma unroll
        for (int e = 0; e < R; ++e) {
          if constexpr (!beyond) row[e] = Exponential()(row[e]);
          w4_row[e] = 4 * w[e] * row[e];
        }
        const Acc* const gradient =
            shared.tile + (me.row + 16 * r) * Shape::kTileStride + first_slot;
#pragma unroll 1
        for (int slot = 0; slot < Shape::kStaged; ++slot) {
          const Acc g = gradient[slot];
          const Vector<Acc> x = Vector<Acc>::load(shared.staging + slot * Shape::kWidth + column);
          if constexpr (beyond) {
            if (g == 0) continue;  // never 0 * NaN
#pragma unroll
            for (int e = 0; e < R; ++e) {
              const Acc t = tanh_of_any(row[e] + x.value[e]);
              acc[r][half * R + e] += g * w[e] * (1 - t * t);
              if constexpr (weight_gradient) acc_weight[half * R + e] += g * t;
            }
          } else {
#pragma unroll
            for (int e = 0; e < R; e += 2) {
              const Acc x1 = 1 + row[e] * x.value[e];
              const Acc x2 = 1 + row[e + 1] * x.value[e + 1];
              const Acc inverse = reciprocal(x1 * x2);
              const Acc r1 = x2 * inverse;
              const Acc r2 = x1 * inverse;
              // In this order: r u <= 1, where u r^2 alone could meet a flushed r^2.
              acc[r][half * R + e] += g * (w4_row[e] * x.value[e] * r1 * r1);
              acc[r][half * R + e + 1] += g * (w4_row[e + 1] * x.value[e + 1] * r2 * r2);
              if constexpr (weight_gradient) {
                acc_weight[half * R + e] += g * (1 - 2 * r1);
                acc_weight[half * R + e + 1] += g * (1 - 2 * r2);
              }
            }
          }
        }
      }
    }
  }

  template <typename T, typename Acc, int R>
  static __device__ __forceinline__ void accumulate_gradient(
      Acc (&acc)[R][2 * R], Acc (&acc_weight)[2 * R], bool weight_gradient, const Side<T>& rows,
      const Side<T>& columns, const Weight<T>& weight, std::int64_t dim, std::int64_t dims,
      bool beyond, const Shared<Acc>& shared) {
    using Shape = Tile<Acc>;
    for (int slot = 0; slot < Shape::kTokens; slot += Shape::kStaged) {
      __syncthreads();
      if (beyond) {
        stage<Shape::kStaged, Shape::kWidth, Shape::kWidth>(shared.staging, columns, slot, dim,
                                                            dims, kLimit<Acc>, Identity());
        __syncthreads();
        add_slopes<true, true>(acc, acc_weight, rows, weight, dim, dims, slot, shared);
      } else {
        stage<Shape::kStaged, Shape::kWidth, Shape::kWidth>(shared.staging, columns, slot, dim,
                                                            dims, kLimit<Acc>, Exponential());
        __syncthreads();
        if (weight_gradient) {
          add_slopes<true, false>(acc, acc_weight, rows, weight, dim, dims, slot, shared);
        } else {
          add_slopes<false, false>(acc, acc_weight, rows, weight, dim, dims, slot, shared);
        }
      }
    }
  }
};

// sum_d w_d f(q_d + k_d), f(x) = x where x > 0 and negative_slope x elsewhere. Costs per score and
// feature: 4 slots of the FMA pipe (sum, product, selection, FMA), in backward 5 or 7.
struct LeakyReluScore {
  static constexpr bool kHasWeight = true;

  template <typename Acc>
  static __device__ __forceinline__ Acc activate(Acc x, Acc negative_slope) {
    return x > 0 ? x : negative_slope * x;
  }

  template <typename T, typename Acc, int R>
  static __device__ __forceinline__ bool score_tile(Acc (&s)[R][R], const Side<T>& rows,
                                                    const Side<T>& columns, const Weight<T>& weight,
                                                    std::int64_t dims, const Shared<Acc>& shared) {
    using Shape = Tile<Acc>;
    constexpr int kStride = Shape::kDepthStride;
    Acc* const column_operand = shared.staging + Shape::kTokens * kStride;
    const Thread me = Thread::me();
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < R; ++c) s[r][c] = 0;
    }
    for (std::int64_t dim = 0; dim < dims; dim += Shape::kDepth) {
      const int depth = dims - dim < Shape::kDepth ? static_cast<int>(dims - dim) : Shape::kDepth;
      __syncthreads();
      stage<Shape::kTokens, Shape::kDepth, kStride>(shared.staging, rows, 0, dim, dims,
                                                    kInfinity<Acc>, Identity());
      stage<Shape::kTokens, Shape::kDepth, kStride>(column_operand, columns, 0, dim, dims,
                                                    kInfinity<Acc>, Identity());
      if (thread < Shape::kDepth) {
        shared.weight[thread] = thread < depth ? weight.at(dim + thread) : Acc(0);
      }
      __syncthreads();
#pragma unroll 1
      for (int d = 0; d < depth; d += R) {
        const Vector<Acc> w = Vector<Acc>::load(shared.weight + d);
        Vector<Acc> b[R];
#pragma unroll
        for (int c = 0; c < R; ++c) {
          b[c] = Vector<Acc>::load(column_operand + (me.column + 16 * c) * kStride + d);
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const Vector<Acc> a = Vector<Acc>::load(shared.staging + (me.row + 16 * r) * kStride + d);
#pragma unroll
          for (int c = 0; c < R; ++c) {
#pragma unroll
            for (int v = 0; v < R; ++v) {
              const Acc x = a.value[v] + b[c].value[v];
              s[r][c] += w.value[v] * activate(x, weight.negative_slope);
            }
          }
        }
      }
    }
    return false;
  }

  // acc[r][d] += sum_column g w_d f'(row_d + column_d), acc_weight[d] += sum g f, g from the tile
  // in shared memory. The row side comes from global memory, once for kStaged columns.
  template <typename T, typename Acc, int R>
  static __device__ __forceinline__ void accumulate_gradient(
      Acc (&acc)[R][2 * R], Acc (&acc_weight)[2 * R], bool weight_gradient, const Side<T>& rows,
      const Side<T>& columns, const Weight<T>& weight, std::int64_t dim, std::int64_t dims,
      bool /*note*/, const Shared<Acc>& shared) {
    using Shape = Tile<Acc>;
    const Thread me = Thread::me();
    for (int first_slot = 0; first_slot < Shape::kTokens; first_slot += Shape::kStaged) {
      __syncthreads();
      stage<Shape::kStaged, Shape::kWidth, Shape::kWidth>(shared.staging, columns, first_slot, dim,
                                                          dims, kInfinity<Acc>, Identity());
      __syncthreads();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half * 16 * R >= dims - dim) break;
        const int column = (me.column + 16 * half) * R;
        Acc w[R];
        load_weights(w, weight, dim + column, dims);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          Acc row[R];
          load_features(row, rows, rows.first + me.row * R + r, dim + column, dims);
          const Acc* const gradient =
              shared.tile + (me.row + 16 * r) * Shape::kTileStride + first_slot;
#pragma unroll 1
          for (int slot = 0; slot < Shape::kStaged; ++slot) {
            const Acc g = gradient[slot];
            if (g == 0) continue;  // never 0 * NaN
            const Vector<Acc> x = Vector<Acc>::load(shared.staging + slot * Shape::kWidth + column);
#pragma unroll
            for (int e = 0; e < R; ++e) {
              const Acc sum = row[e] + x.value[e];
              acc[r][half * R + e] += g * w[e] * (sum > 0 ? Acc(1) : weight.negative_slope);
              if (weight_gradient) {
                acc_weight[half * R + e] += g * activate(sum, weight.negative_slope);
              }
            }
          }
        }
      }
    }
  }
};

// The first of a thread's kPerThread queries (rows) and kPerThread keys (columns) of a tile.
struct Pairs {
  std::int64_t query;
  std::int64_t key;

  template <typename Acc>
  static __device__ __forceinline__ Pairs of(std::int64_t first_query, std::int64_t first_key) {
    const Thread me = Thread::me();
    return {first_query + me.row * Tile<Acc>::kPerThread,
            first_key + me.column * Tile<Acc>::kPerThread};
  }
  __device__ __forceinline__ int query_step(int q) const { return q; }
  __device__ __forceinline__ int key_step(int k) const { return k; }
};

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

// The dropout factors of a row's kPerThread consecutive keys: one Philox block.
template <typename Acc>
struct DropoutFactors {
  Dropout dropout;
  bool active;

  static __device__ __forceinline__ DropoutFactors of(const AttentionProblem& p) {
    const bool active = p.dropout_p > 0;
    return {active ? Dropout::make(p.dropout_p, p.philox_state) : Dropout(), active};
  }

  // Of the q-th row of a thread's pairs.
  template <int R>
  __device__ __forceinline__ void load_row(Acc (&factor)[R], const AttentionProblem& p,
                                           std::int64_t batch, std::int64_t head, Pairs pairs,
                                           int q) const {
    const std::int64_t row = (batch * p.heads + head) * p.query_length + pairs.query + q;
    const PhiloxBlock random =
        philox(dropout.seed, dropout.offset, Dropout::block_index(row, pairs.key, p.key_length));
    const bool upper = R == 2 && pairs.key % 4 != 0;  // which half of the block
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const std::uint32_t value = upper ? random.value[(k + 2) % 4] : random.value[k];
      factor[k] = dropout.keep(value) ? static_cast<Acc>(dropout.keep_scale) : Acc(0);
    }
  }

  template <int R>
  __device__ __forceinline__ void load(Acc (&factor)[R][R], const AttentionProblem& p,
                                       std::int64_t batch, std::int64_t head, Pairs pairs) const {
#pragma unroll
    for (int q = 0; q < R; ++q) load_row(factor[q], p, batch, head, pairs, q);
  }
};

}  // namespace torch_selfattn::kernels::cuda
