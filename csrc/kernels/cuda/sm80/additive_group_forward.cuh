#pragma once

#include "kernels/cuda/sm80/additive_group_tile.cuh"

// Additive attention, forward, by the group method: num and den of four features are one MMA each,
// of the products of additive_group_products.cuh.
//
// A block of 4 warps owns 64 queries of one (batch, head) and all columns of the values, a warp 16
// of the queries. The products of its queries are made in the prologue and stay in shared memory,
// each lane's where only that lane reads them. From there the warp decides for its rows how many
// groups may share a reciprocal: 4, 2, or, for the whole block, that the generic kernel must do it.
// Then steps of (tile of 64 keys, two quads of 16 features) take turns in two stages, filled
// by cp.async a step ahead; after the last quad of a tile: bias, softmax (with a running maximum
// unless the scores are bounded), dropout, weights V. A tile that the mask hides from all rows is
// passed over.
// A block whose results are not all finite is also left to the generic kernel, which keeps NaN and
// infinities of masked keys and values from spreading.
//
// Traffic: products of the keys, 128 bytes per key and quad, once per block (from L2); v as often;
// q, out and lse once. Counts per warp for 16 x 8 pairs of one group (there are Lq Lk E / 512 of
// these), in issue slots, four groups to a reciprocal, sm_90a, E = Ev = 64: 14.8 in add_quad (2
// MMA, 10 FMUL and FFMA, 1 MUFU, 0.7 LDS.128, 0.5 HMUL2), 1.6 for steps, 3.3 per tile of keys
// (softmax, V; 0.9 more with a running maximum), 1.2 for the prologue and the end at 1024 keys.
// Bound: latency, with three warps to a scheduler, then issue slots; docs/kernels.md has what was
// measured.
namespace torch_selfattn::kernels::cuda::sm80 {

// e^score, and what is summed up of it, is far from the ends of float32 and of bfloat16.
constexpr float kBoundedScore = 40;

// s[row][key] += sum over the 16 features of a quad, of the warp's 16 rows and a tile of keys.
template <int kJoined, int K>
__device__ __forceinline__ void add_quad(float (&s)[2][K], const uint4* queries,
                                         const uint4* weights, const uint4* keys) {
  using BFloat16 = __nv_bfloat16;
  const int thread = thread_index_here();
  const int lane = thread % 32;
  std::uint32_t a[4][4];
  std::uint32_t weighted[4][4];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint4 w = weights[pair * 4 + lane % 4];
    const std::uint32_t of_group[2][2] = {{w.x, w.y}, {w.z, w.w}};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int g = 2 * pair + half;
      const uint4 x = queries[g * kForwardThreads + thread];
      a[g][0] = x.x;
      a[g][1] = x.y;
      a[g][2] = x.z;
      a[g][3] = x.w;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        weighted[g][i] = multiply_bf16x2(a[g][i], of_group[half][i / 2]);
      }
    }
  }
#pragma unroll
  for (int column = 0; column < K / 2; ++column) {
    float num[4][4];
    float den[4][4];
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint4 b = keys[column * 64 + pair * 32 + lane];
      mma_product_m16n8k16<BFloat16>(num[2 * pair], weighted[2 * pair], {b.x, b.y});
      mma_product_m16n8k16<BFloat16>(den[2 * pair], a[2 * pair], {b.x, b.y});
      mma_product_m16n8k16<BFloat16>(num[2 * pair + 1], weighted[2 * pair + 1], {b.z, b.w});
      mma_product_m16n8k16<BFloat16>(den[2 * pair + 1], a[2 * pair + 1], {b.z, b.w});
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& score = s[i / 2][2 * column + i % 2];
      const float num_01 = num[0][i] * den[1][i] + num[1][i] * den[0][i];
      const float num_23 = num[2][i] * den[3][i] + num[3][i] * den[2][i];
      const float den_01 = den[0][i] * den[1][i];
      const float den_23 = den[2][i] * den[3][i];
      if constexpr (kJoined == 4) {
        score += (num_01 * den_23 + num_23 * den_01) * reciprocal_approx(den_01 * den_23);
      } else {
        score += num_01 * reciprocal_approx(den_01);
        score += num_23 * reciprocal_approx(den_23);
      }
    }
  }
}

// What the least denominators of a row are, with the factors of either way to join.
struct Least {
  float four = kInfinity<float>;
  float two = kInfinity<float>;

  // `group`: of each of the four groups of a quad, without factors. Those come before products,
  // which would underflow.
  __device__ __forceinline__ void add_quad(const float (&group)[4]) {
    const float a = group[0] * kFactor * (group[1] * kFactor);
    const float b = group[2] * kFactor * (group[3] * kFactor);
    four = fminf(four, fminf(fminf(a, b), a * b));
    constexpr float kBoth = kFactor * kFactor;
    two = fminf(
        two, fminf(group[0] * kBoth * (group[1] * kBoth), group[2] * kBoth * (group[3] * kBoth)));
  }
};

// Prologue: the weights W of all groups, times scale, as the lanes multiply by them.
template <typename T>
__device__ __forceinline__ void stage_weights(uint2* to, const Weight<T>& weight, std::int64_t dims,
                                              std::int64_t quads, float scale) {
  for (int index = static_cast<int>(threadIdx.x); index < quads * 16; index += kForwardThreads) {
    const int group = index / 4;
    const int p = index % 4;
    float w[4];
#pragma unroll
    for (int d = 0; d < 4; ++d) {
      w[d] = group * 4 + d < dims ? scale * weight.at(group * 4 + d) : 0.0f;
    }
    const float middle = ((p & 1) != 0 ? w[1] : -w[1]) + ((p & 2) != 0 ? w[2] : -w[2]);
    const float minus = middle - w[3];
    const float plus = middle + w[3];
    to[(group / 2 * 4 + p) * 2 + group % 2] =
        make_uint2(pack<__nv_bfloat16>(minus - w[0], minus + w[0]),
                   pack<__nv_bfloat16>(plus - w[0], plus + w[0]));
  }
}

// Prologue: the products of the lane's two rows, as A operands. Returns the least denominators that
// the warp can meet, whatever the keys.
template <typename T>
__device__ __forceinline__ Least stage_queries(uint4* to, const AttentionProblem& p,
                                               const Tokens<T>& queries, std::int64_t first_query,
                                               const float* centre, const float* floor,
                                               std::int64_t quads) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = FragmentPairs::of(first_query, 0).query;
  const T* const tokens[2] = {queries.data + row * queries.token_stride,
                              queries.data + (row + 8) * queries.token_stride};
  const int dims = static_cast<int>(p.head_dim);
  const int dims_of_row[2] = {row < p.query_length ? dims : 0, row + 8 < p.query_length ? dims : 0};
  Least least;
#pragma unroll 1
  for (int quad = 0; quad < quads; ++quad) {
    float lowest[2][4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const int d = quad * kQuadFeatures + g * 4 + lane % 4;
      const float middle = centre[d];
      uint2 of_row[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float x =
            d < dims_of_row[h] ? to_acc(tokens[h][d * queries.dim_stride]) + middle : 0.0f;
        float smaller[4];
        exchange(smaller, smaller_side(x));
        of_row[h] = products(smaller, 1.0f);
        lowest[h][g] = 1;
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // a factor of den is between the sides of either token
          lowest[h][g] *= fmaxf(fabsf(smaller[e]), floor[d - lane % 4 + e]);
        }
      }
      to[(quad * 4 + g) * kForwardThreads] =
          make_uint4(of_row[0].x, of_row[1].x, of_row[0].y, of_row[1].y);
    }
    least.add_quad(lowest[0]);
    least.add_quad(lowest[1]);
  }
  return least;
}

__device__ __forceinline__ std::uint8_t& redo_of(const GroupWorkspace& workspace,
                                                 const QueryBlock& block) {
  return workspace.redo[block.batch_head * workspace.query_tiles + block.query_tile];
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kForwardThreads, GroupTile<kWidth>::kBlocks)
    additive_group_forward_kernel(const __grid_constant__ AttentionForward call,
                                  const __grid_constant__ GroupWorkspace workspace) {
  using Tile = GroupTile<kWidth>;
  constexpr int K = 2 * Tile::kColumns;  // keys of a tile that a lane has
  const AttentionProblem& p = call.problem;
  const int quads = static_cast<int>(workspace.quads);
  const auto quads_u = static_cast<std::uint32_t>(quads);
  const int thread = static_cast<int>(threadIdx.x);
  const int stage_size = Tile::stage_size(quads);
  uint4* const stages = shared_at<uint4>(0, static_cast<std::uint32_t>(Tile::kStages * stage_size));
  T* const values = shared_at<T>(Tile::values_at(quads), Tile::kValueSize);
  QueryBlock& block = *shared_at<QueryBlock>(Tile::block_at(quads), 1);
  uint4* const weights = shared_at<uint4>(Tile::weights_at(quads), quads_u * Tile::kWeightSize);
  uint4* const queries = shared_at<uint4>(Tile::queries_at(quads), quads_u * Tile::kQuerySize);

  // Prologue.
  const uint4* load_from;
  int next;  // tile of keys to load, if the mask leaves any pair of it
  bool join_four;
  {
    QueryBlock mine = QueryBlock::of(p, workspace.query_tiles, kRows, tile_keys(p.value_dim));
    next = mine.first_tile;
    load_from = workspace.key_products +
                (mine.kv_row(p) * workspace.key_tiles + next) * quads * Tile::kQuadSize + thread;
    const auto weight = Weight<T>::of(p, mine.batch, mine.head);
    const auto scale = static_cast<float>(p.scale);
    stage_weights(reinterpret_cast<uint2*>(weights), weight, p.head_dim, quads, scale);
    const std::int64_t first_feature = mine.kv_row(p) * workspace.centre.features;
    const Least least = stage_queries(
        queries + thread, p, Tokens<T>::of(p.query, mine.batch, mine.head), mine.first_query,
        workspace.centre.centre + first_feature, workspace.centre.floor + first_feature, quads);
    join_four = __all_sync(~0u, least.four >= kLeastDenominator) != 0;
    const WeightNorms norms = WeightNorms::of(weight, p.head_dim, scale);
    const bool small_weights = norms.squares <= kLargestWeightNorm * kLargestWeightNorm;
    mine.bounded = std::is_same_v<T, __nv_bfloat16> && norms.sum <= kBoundedScore &&
                   p.mask_kind != MaskKind::kFloat && p.slopes == nullptr;
    if (thread == 0) block = mine;
    if (__syncthreads_and(small_weights && least.two >= kLeastDenominator) == 0) {
      if (thread == 0) redo_of(workspace, mine) = 1;
      return;
    }
  }
  if (!join_four) {
    const std::uint32_t factor = pack<__nv_bfloat16>(kFactor, kFactor);
#pragma unroll 1
    for (int g = 0; g < 4 * quads; ++g) {
      uint4& x = queries[g * kForwardThreads + thread];
      x = make_uint4(multiply_bf16x2(x.x, factor), multiply_bf16x2(x.y, factor),
                     multiply_bf16x2(x.z, factor), multiply_bf16x2(x.w, factor));
    }
  }

  // Loads the next quads, as they follow one another in memory.
  const int step_quads = Tile::step_quads(quads);
  const auto load = [&](int count, int stage) {
    uint4* to = stages + stage * stage_size + thread_index_here();
#pragma unroll 1
    for (; count > 0; --count) {
#pragma unroll
      for (int n = 0; n < Tile::kQuadSize; n += kForwardThreads) cp_async16(to + n, load_from + n);
      to += Tile::kQuadSize;
      load_from += Tile::kQuadSize;
    }
    cp_async_commit();
  };

  // While a step is computed the next one is loaded, of the tile or the first of the next tile. The
  // first round only loads.
  FragmentSoftmax softmax;
  float out[kWidth / 8][4] = {};
  float s[2][K] = {};
  int stage = 0;
#pragma unroll 1
  for (int tile = -1;; tile = next++) {
    const int end_tile = block.end_tile;
    const int after = next;
    for (; next < end_tile && p.mask_kind != MaskKind::kNone; ++next) {
      bool any = false;
#pragma unroll 1
      for (int column = 0; column < Tile::kColumns; ++column) {
        float bias[2][2];
        const std::int64_t key = static_cast<std::int64_t>(next) * Tile::kKeys + 8 * column;
        any |= load_biases<T>(bias, p, block.batch, block.head,
                              FragmentPairs::of(block.first_query, key));
      }
      if (__syncthreads_or(any) != 0) break;
    }
    const bool last = next >= end_tile;
    const std::int64_t skipped = static_cast<std::int64_t>(next - after) * quads * Tile::kQuadSize;
    if (tile < 0) {
      if (last) break;
      load_from += skipped;
      load(step_quads, stage);
      continue;
    }

#pragma unroll 1
    for (int first = 0; first < quads; first += step_quads) {
      cp_async_wait<0>();
      __syncthreads();
      if (first == 0) {
        stage_values<T, kWidth>(values, Tokens<T>::of(p.value, block.batch, block.kv_head),
                                static_cast<std::int64_t>(tile) * Tile::kKeys, block.keys,
                                p.value_dim);
      }
      const int rest = quads - first - step_quads;
      if (rest <= 0) load_from += skipped;
      load(rest > 0 ? min(rest, step_quads) : last ? 0 : step_quads, stage ^ 1);

      const uint4* keys = stages + stage * stage_size;
      const int end = min(first + step_quads, quads);
#pragma unroll 1
      for (int quad = first; quad < end; ++quad) {
        const uint4* const quad_queries = queries + quad * Tile::kQuerySize;
        const uint4* const quad_weights = weights + quad * Tile::kWeightSize;
        if (join_four) {
          add_quad<4>(s, quad_queries, quad_weights, keys);
        } else {
          add_quad<2>(s, quad_queries, quad_weights, keys);
        }
        keys += Tile::kQuadSize;
      }
      stage ^= 1;
    }

    const std::int64_t first_key = static_cast<std::int64_t>(tile) * Tile::kKeys;
    if (p.mask_kind != MaskKind::kNone || p.slopes != nullptr || tile < block.first_full_tile ||
        tile >= block.end_full_tile) {
      float bias[2][K];
      load_biases<T>(bias, p, block.batch, block.head,
                     FragmentPairs::of(block.first_query, first_key));
      finish_scores(s, bias, 1.0f);  // the scale is in the weights
    }
    if (block.bounded) {
      softmax.add_bounded(s);
    } else {
      float rescale[2];
      softmax.update(s, rescale);
#pragma unroll
      for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= rescale[i / 2];
      }
    }
    if (p.dropout_p > 0) {
      const std::int64_t row =
          block.batch_head * p.query_length + FragmentPairs::of(block.first_query, first_key).query;
      drop(s, Dropout::make(p.dropout_p, p.philox_state), p, row, first_key);
    }
    std::uint32_t weights_of_values[K / 4][4];
    pack_weights<T>(weights_of_values, s);
#pragma unroll
    for (int k = 0; k < K; ++k) s[0][k] = s[1][k] = 0;  // for the next tile
    if (quads <= step_quads) {  // the values were not among the copies waited for above
      cp_async_wait<0>();
      __syncthreads();
    }
    add_values<T, kWidth>(out, weights_of_values, values, p.value_dim);
    if (last) break;
  }

  softmax.join_lanes();
  bool finite = true;
  const float kept_scale =
      p.dropout_p > 0 ? static_cast<float>(Dropout::make(p.dropout_p, p.philox_state).keep_scale)
                      : 1.0f;
  const auto rows = OutputRows<T>::of(call.out, block.batch, block.head, p.value_dim);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto pairs = FragmentPairs::of(block.first_query, 0);
    const std::int64_t i = pairs.query + pairs.query_step(h);
    const float sum = softmax.sum[h];
    const bool empty = sum == 0;
    const float inverse = empty ? 0.0f : kept_scale / sum;
    finite = finite && sum <= kLargest<float>;
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n) {
      const float x = out[n][2 * h] * inverse;
      const float y = out[n][2 * h + 1] * inverse;
      finite = finite && fabsf(x) <= kLargest<float> && fabsf(y) <= kLargest<float>;
      if (i < p.query_length) rows.store_pair(i, n * 8 + static_cast<int>(pairs.key), x, y);
    }
    if (thread % 4 == 0 && i < p.query_length) {
      static_cast<float*>(call.lse)[block.batch_head * p.query_length + i] =
          empty ? -kInfinity<float> : softmax.maximum[h] + logf(sum);
    }
  }
  const bool block_finite = __syncthreads_and(finite) != 0;
  if (thread == 0) redo_of(workspace, block) = block_finite ? 0 : 1;
}

}  // namespace torch_selfattn::kernels::cuda::sm80
