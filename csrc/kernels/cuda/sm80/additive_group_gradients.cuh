#pragma once

#include "kernels/cuda/sm80/additive_group_gradients_pieces.cuh"

// Additive attention, backward, by the group method: dq and the parts of dw (a block owns queries),
// dk and dv (it owns keys). With phi the products of additive_group_products.cuh, U = g / den and
// V = U num / den of a group,
//
//   the gradient of the log of phi_x^s is h_s = phi_x^s (W_s a_s - b_s),
//   a_s = sum_y U phi_y^s,  b_s = sum_y V phi_y^s                        (two MMAs)
//   dx_d = 2 (sigma(-2x) sum_{s: bit d} h_s - sigma(2x) sum_{s: no bit d} h_s)
//   dw_d = sum_s +- phi_q^s a_s, + where bit d
//
// for a token x among the rows and tokens y among the columns. g needs the score of all features,
// so num and den are needed twice. They are made once and kept, as 1/den and num/den in bfloat16,
// in registers: a warp has the four groups of a quad only, and 16 rows by 16 columns of them at a
// time. The warps of a stripe of 16 rows add up their parts of the scores through shared memory,
// in order, and share the work on p and g:
//   scores of a quad -> barrier -> sum, bias, p, dropout, g -> barrier -> U, V, a and b, dv
// Before, dP of a tile of 32 columns is made by the same warps.
//
// Where all features are saturated, W_s and num/den are nearly the same number, and the difference
// of a and b would be their rounding errors, and those of the scores would be alike for all
// columns. So a constant c of the group is subtracted from its W_s, and with it from num/den: w
// times the mean tanh, from which num/den differs little then. And W_s phi_x^s is taken as rounded
// in the operand of num, so that the two cancel as in the scores.
//
// The p of a query add up to 1. The blocks of queries divide by what they add up to instead, and
// leave it for the blocks of keys. More than a little off, and the generic kernel takes over.
// The g of a query add up to the gradient of its lse. What sum_s phi^s a_s says instead is an error
// of rounded numbers, most of which all features share: so it is taken out of dq and dw, times what
// 1 - tanh^2 and tanh are on average, roughly.
//
// Every number of products carries 2^28, g too, so that U stays in the middle of the range.
// A block with a result that is not finite sets redo, and the generic kernel does the (batch, key
// head) again; so NaN and infinities of masked pairs do not spread.
//
// Traffic: 64 bytes of products per column and group, and value or dO, once per block (from L2).
// Counts per warp for 16 x 8 pairs of one group (there are Lq Lk E / 512 of these, in each of the
// two launches), at E = Ev = 64: docs/kernels.md. Bound: shared memory (12 LDSM.x4 for the scores
// and 4 for the gradients of 8 such units), then issue slots; the chain of two barriers is hidden
// by the other stripes.
namespace torch_selfattn::kernels::cuda::sm80 {

// `kOf64`: the shape is kShapeOf64.
template <typename T, bool kOwnsKeys, bool kOf64>
__global__ void __launch_bounds__(32 * kMostGradientWarps, 1)
    additive_group_gradients_kernel(const __grid_constant__ AttentionBackward call,
                                    const __grid_constant__ GradientWorkspace workspace,
                                    const __grid_constant__ GradientShape any_shape) {
  using BFloat16 = __nv_bfloat16;
  using Owner = GradientOwner<kOwnsKeys>;
  static_assert(sizeof(Owner) <= GradientShape::kOwnerBytes);
  const AttentionProblem& p = call.problem;
  const GradientShape shape = kOf64 ? kShapeOf64 : any_shape;
  const int quads = shape.quads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int stripe = warp / quads;
  const int quad = warp % quads;

  const auto warps = static_cast<std::uint32_t>(shape.warps());
  const auto stripes = static_cast<std::uint32_t>(shape.stripes);
  const auto value_size = static_cast<std::uint32_t>(shape.value_chunks) * 8;  // of a token
  uint4* const rows = shared_at<uint4>(0, 2 * warps * 128) + warp * 128;
  uint4* const weighted = rows + warps * 128;
  uint4* const columns = shared_at<uint4>(shape.columns_at(), 2 * shape.column_bytes() / 16);
  T* const row_values = shared_at<T>(shape.row_values_at(), shape.rows() * value_size);
  T* const column_values = shared_at<T>(shape.column_values_at(), 2 * kColumnTokens * value_size);
  float4* const statistics = shared_at<float4>(shape.statistics_at(), 2 * kColumnTokens);
  float2* const partials =
      shared_at<float2>(shape.partials_at(), warps * 128) + stripe * quads * 128;
  float2* const products = shared_at<float2>(shape.products_at(), stripes * 256) + stripe * 256;
  std::uint32_t* const gradients =
      shared_at<std::uint32_t>(shape.gradients_at(), stripes * 256) + stripe * 256;
  Owner& owner = *shared_at<Owner>(shape.owner_at(), 1);

  bool redone = false;
  if (threadIdx.x == 0) {
    owner = Owner::template of<T>(call, workspace, shape);
    redone = atomicMax(workspace.redo + owner.batch * p.kv_heads + owner.kv_head, 0U) != 0;
  }
  if (__syncthreads_or(redone) != 0) return;

  const auto load = [&](int head, int tile, int stage) {
    const int thread = thread_index_here();
    const int threads = 32 * shape.warps();
    const int of_head = head - owner.first_head;
    const int count = quads * 256;
    const uint4* from =
        owner.products + of_head * owner.products_of_head + std::int64_t{tile} * count + thread;
    uint4* const to = columns + stage * count;
#pragma unroll(kOf64 ? 3 : 1)
    for (int n = thread; n < count; n += threads) {
      cp_async16(to + n, from);
      from += threads;
    }
    owner.values.stage(column_values + stage * kColumnTokens * value_size, of_head,
                       std::int64_t{tile} * kColumnTokens, kColumnTokens, p.value_dim, threads);
    if (kOwnsKeys && thread < kColumnTokens) {
      cp_async16(statistics + stage * kColumnTokens + thread,
                 owner.statistics + of_head * owner.statistics_of_head +
                     std::int64_t{tile} * kColumnTokens + thread);
    }
    cp_async_commit();
  };
  // Moves on to a tile with a pair that is allowed, or to end_head. All threads call.
  const auto advance = [&](int& head, int& tile) {
    for (;;) {
      if (++tile >= owner.end_tile) {
        tile = owner.first_tile;
        if (++head >= owner.end_head) return;
      }
      if (p.mask_kind == MaskKind::kNone) return;
      bool any = false;
#pragma unroll 1
      for (int piece = quad; piece < 2 * kPieces; piece += quads) {
        const auto pairs = PiecePairs<kOwnsKeys>::of(
            owner.first_row + stripe * kStripe + lane / 4 + piece % 2 * 8,
            std::int64_t{tile} * kColumnTokens + piece / 2 * 8 + lane % 4 * 2);
        float bias[kPieceQueries<kOwnsKeys>][3 - kPieceQueries<kOwnsKeys>];
        any |= load_biases<T>(bias, p, owner.batch, head, pairs);
      }
      if (__syncthreads_or(any) != 0) return;
    }
  };

  int next_head = owner.first_head;
  int next_tile = owner.first_tile - 1;
  if (owner.first_tile < owner.end_tile) {
    advance(next_head, next_tile);
  } else {
    next_head = owner.end_head;
  }

  {  // The rows' operands. Stripes beyond the last one take that one, and write nothing.
    const auto stripe_of = RowStripe<kOwnsKeys>::of(p, workspace, owner, stripe);
    const uint4* const from = (kOwnsKeys ? workspace.keys : workspace.queries) +
                              stripe_of.index * workspace.stripe_size() + quad * 128;
    for (int n = lane; n < 128; n += 32) cp_async16(rows + n, from + n);
    Owner::template values_of<T>(call, owner, kOwnsKeys, key_range(p, owner.batch))
        .stage(row_values, 0, owner.first_row, shape.rows(), p.value_dim, 32 * shape.warps());
    if (!kOwnsKeys && quad == 0 && lane < kStripe) {
      cp_async16(statistics + stripe * kStripe + lane,
                 workspace.statistics + stripe_of.index * kStripe + lane);
    }
    cp_async_commit();
  }
  if (next_head < owner.end_head) load(next_head, next_tile, 0);

  float a[4][2][4] = {};  // sums of U phi: group, 8 products, as an MMA accumulator
  float b[4][2][4] = {};  // of V phi
  float value_gradient[2][4] = {};
  float constants = 0;    // of the quad, which its scores lack
  float row_sum[2] = {};  // of p of rows l / 4 and l / 4 + 8, over the lane's columns
  const auto lanes = LaneRows::get();
  const std::uint32_t rows_at = shared_address(rows) + lanes.of_a;

  const bool drops = p.dropout_p > 0;
  int stage = 0;
  int head_of_weights = -1;
#pragma unroll 1
  while (next_head < owner.end_head) {
    const int head = next_head;
    const int tile = next_tile;
    advance(next_head, next_tile);
    cp_async_wait<0>();
    __syncthreads();
    if (next_head < owner.end_head) load(next_head, next_tile, stage ^ 1);
    if (head != head_of_weights) {
      constants = weigh_rows<T>(weighted, rows, p, workspace, owner.batch, head, quad);
      head_of_weights = head;
    }

    const std::uint32_t values_at =
        shared_address(column_values) + stage * kColumnTokens * value_size * 2;
    {  // dP
      const auto lane_rows = LaneRows::get();
      const std::uint32_t of_rows_at =
          shared_address(row_values) + stripe * kStripe * 128 + lane_rows.of_a;
#pragma unroll 1
      for (int column = quad; column < kColumnTokens / 8; column += quads) {
        std::uint32_t a_at = of_rows_at;
        std::uint32_t b_at = values_at + column * 8 * 128 + lane_rows.of_8;
        float dp[4] = {};
#pragma unroll 1
        for (int d = 0; d < p.value_dim; d += kSlabColumns) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {  // 32 columns of the values
            if (d + half * 32 >= p.value_dim) break;
            std::uint32_t of_columns[4];
            ldmatrix(of_columns, b_at ^ (half * 64));
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              std::uint32_t of_rows[4];
              ldmatrix(of_rows, a_at ^ (half * 64 + k * 32));
              mma_m16n8k16<T>(dp, of_rows, {of_columns[2 * k], of_columns[2 * k + 1]});
            }
          }
          a_at += shape.rows() * 128;
          b_at += kColumnTokens * 128;
        }
        float2* const to = products + column * 64 + lane;
        to[0] = make_float2(dp[0], dp[1]);
        to[32] = make_float2(dp[2], dp[3]);
      }
    }

    const bool plain = tile >= owner.first_full_tile && tile < owner.end_full_tile && !drops;
#pragma unroll 1
    for (int batch = 0; batch < 2; ++batch) {  // of 16 columns
      const std::uint32_t batch_at =
          shared_address(columns) + ((stage * 2 + batch) * quads + quad) * 2048;
      KeptRatios kept;
      {
        float scores[2][4] = {{constants, constants, constants, constants},
                              {constants, constants, constants, constants}};
        kept.compute(scores, rows_at, rows_at + shape.weighted_at(), batch_at + lanes.of_b);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) {
          partials[(piece * quads + quad) * 32 + lane] =
              make_float2(scores[piece / 2][piece % 2 * 2], scores[piece / 2][piece % 2 * 2 + 1]);
        }
      }
      barrier_sync(1 + stripe, 32 * quads);
#pragma unroll 1
      for (int piece = quad; piece < kPieces; piece += quads) {
        const int lane_here = thread_index_here() % 32;
        Piece<T, kOwnsKeys> mine;
        {
          const float2* const parts = partials + piece * quads * 32 + lane_here;
          float2 sum = parts[0];
#pragma unroll 3
          for (int other = 1; other < quads; ++other) {
            const float2 part = parts[other * 32];
            sum.x += part.x;
            sum.y += part.y;
          }
          mine.score_of(0) = sum.x;
          mine.score_of(1) = sum.y;
        }
        const int row = stripe * kStripe + lane_here / 4 + piece % 2 * 8;
        const int column = batch * 16 + piece / 2 * 8 + lane_here % 4 * 2;
        mine.factor[0][0] = mine.factor[Piece<T, kOwnsKeys>::Q - 1][Piece<T, kOwnsKeys>::K - 1] = 1;
        if (!plain) {
          const auto pairs = PiecePairs<kOwnsKeys>::of(owner.first_row + row,
                                                       std::int64_t{tile} * kColumnTokens + column);
          mine.add_bias(p, owner.batch, head, pairs);
          if (drops) mine.draw(owner.dropout, p, owner.batch, head, pairs);
        }
        const float2 product = products[(batch * kPieces + piece) * 32 + lane_here];
        float weight[2];
        float gradient[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float4 query =
              kOwnsKeys ? statistics[stage * kColumnTokens + column + n] : statistics[row];
          const float factor = mine.factor_of(n);
          const float probability = exp2_approx((mine.score_of(n) - query.x) * kLog2E + query.y);
          gradient[n] =
              kFactor * probability * (factor * (n == 0 ? product.x : product.y) - query.z);
          weight[n] = factor == 0 ? 0.0f : kWeightFactor<T> * probability;
          if constexpr (!kOwnsKeys) {
            row_sum[0] += piece % 2 == 0 ? probability : 0.0f;
            row_sum[1] += piece % 2 == 1 ? probability : 0.0f;
          }
        }
        gradients[lane_here * 4 + piece] = pack<BFloat16>(gradient[0], gradient[1]);
        if constexpr (kOwnsKeys)
          gradients[128 + lane_here * 4 + piece] = pack<T>(weight[0], weight[1]);
      }
      barrier_sync(1 + stripe, 32 * quads);
      {
        const uint4 g4 = *reinterpret_cast<const uint4*>(gradients + lane * 4);
        const std::uint32_t g[kPieces] = {g4.x, g4.y, g4.z, g4.w};
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          std::uint32_t phi[4];
          ldmatrix<true>(phi, (batch_at + lanes.of_a) ^ (group * 32));
          std::uint32_t u[kPieces];
          std::uint32_t v[kPieces];
#pragma unroll
          for (int piece = 0; piece < kPieces; ++piece) {
            u[piece] = multiply_bf16x2(g[piece], kept.inverse[group][piece]);
            v[piece] = multiply_bf16x2(u[piece], kept.ratio[group][piece]);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            mma_m16n8k16<BFloat16>(a[group][half], u, {phi[2 * half], phi[2 * half + 1]});
            mma_m16n8k16<BFloat16>(b[group][half], v, {phi[2 * half], phi[2 * half + 1]});
          }
        }
      }
      if constexpr (kOwnsKeys) {
        if (quad * 16 < p.value_dim) {
          const uint4 w4 = *reinterpret_cast<const uint4*>(gradients + 128 + lane * 4);
          const std::uint32_t weights[kPieces] = {w4.x, w4.y, w4.z, w4.w};
          std::uint32_t of_columns[4];
          ldmatrix<true>(of_columns, (values_at + (quad / 4 * kColumnTokens + batch * 16) * 128 +
                                      LaneRows::get().of_a) ^
                                         (quad % 4 * 32));
          mma_m16n8k16<T>(value_gradient[0], weights, {of_columns[0], of_columns[1]});
          mma_m16n8k16<T>(value_gradient[1], weights, {of_columns[2], of_columns[3]});
        }
      }
    }

    if (next_head != head) {  // b becomes what is summed over heads; a starts anew
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        std::uint32_t x[4];
        std::uint32_t wx[4];
        ldmatrix(x, rows_at ^ (group * 32));
        ldmatrix(wx, (rows_at + shape.weighted_at()) ^ (group * 32));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int n = 2 * half + e / 2;
            const float phi = e % 2 == 0 ? lower(x[n]) : upper(x[n]);
            const float w_phi = e % 2 == 0 ? lower(wx[n]) : upper(wx[n]);
            float& sum = a[group][half][e];
            if (phi >= 0x1p-126f) {
              b[group][half][e] -= w_phi * reciprocal_approx(phi) * sum;
            }
            if (kOwnsKeys) sum = 0;
          }
        }
      }
    }
    stage ^= 1;
  }
  cp_async_wait<0>();
  __syncthreads();

  const auto stripe_of = RowStripe<kOwnsKeys>::of(p, workspace, owner, stripe);
  const std::int64_t kv_row = owner.batch * p.kv_heads + owner.kv_head;
  const KeyRange keys = key_range(p, owner.batch);
  bool finite = true;
  float inverse_sum[2] = {1, 1};
  if constexpr (!kOwnsKeys) {
    float* const sums = reinterpret_cast<float*>(partials);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 1);
      row_sum[h] += __shfl_xor_sync(~0u, row_sum[h], 2);
      if (lane % 4 == 0) sums[quad * kStripe + lane / 4 + 8 * h] = row_sum[h];
    }
    barrier_sync(1 + stripe, 32 * quads);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      float sum = 0;
      for (int other = 0; other < quads; ++other) sum += sums[other * kStripe + row];
      // Rows that have no key or do not exist.
      if (!stripe_of.exists || statistics[stripe * kStripe + row].x == kInfinity<float>) continue;
      finite = finite && fabsf(sum - 1) <= kLargestSumError;
      inverse_sum[h] = 1 / sum;
      if (quad == 0 && lane % 4 == 0) {
        workspace.statistics[stripe_of.index * kStripe + row].y -= log2f(sum);
      }
    }
  }
  const auto put = [&](const View& to, int head, std::int64_t token, std::int64_t d, float x) {
    finite = finite && fabsf(x) <= kLargest<float>;
    store<T>(to, owner.batch, head, token, d, x);
  };
  const std::int64_t length = kOwnsKeys ? p.key_length : p.query_length;
  const std::int64_t first = owner.first_row + stripe * kStripe + lane / 4;
  const auto head = static_cast<int>(kOwnsKeys ? owner.kv_head : owner.first_head);
  const auto tokens = Tokens<T>::of(kOwnsKeys ? p.key : p.query, owner.batch, head);
#pragma unroll
  for (int group = 0; group < 4; ++group) {
    std::uint32_t x[4];
    ldmatrix(x, rows_at ^ (group * 32));
    const int d = quad * kQuadFeatures + group * 4 + lane % 4;  // the lane's feature
    const std::int64_t feature = kv_row * workspace.centre.features + d;
    const float centre = workspace.centre.centre[feature];
    float weight_gradient = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      BitSums of_a;
      BitSums of_b;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const std::uint32_t both = x[2 * half + h];
          const float phi = e == 0 ? lower(both) : upper(both);
          of_b.add(2 * half + e, phi * b[group][half][2 * h + e]);
          if constexpr (!kOwnsKeys) of_a.add(2 * half + e, phi * a[group][half][2 * h + e]);
        }
      }
      of_b.join_lanes();
      const std::int64_t token = first + 8 * h;
      const bool exists = token < length && d < p.head_dim;
      const bool used = exists && (!kOwnsKeys || (token >= keys.begin && token < keys.end));
      float number =
          used ? to_acc(tokens.data[token * tokens.token_stride + d * tokens.dim_stride]) : 0.0f;
      if (used) number += kOwnsKeys ? -centre : centre;
      const Sides sides = Sides::of(smaller_side(number));
      const float plus = of_b.of(lane % 4);
      float gradient = -2 * (sides.minus * plus - sides.plus * (of_b.all - plus));
      if constexpr (!kOwnsKeys) {
        of_a.join_lanes();
        const float grad_lse = statistics[stripe * kStripe + lane / 4 + 8 * h].w;
        const float excess = inverse_sum[h] * of_a.all - kFactor * grad_lse;
        const auto mean = MeanOverKeys::of(number, workspace.centre.floor[feature]);
        const float w =
            d < p.head_dim ? static_cast<float>(p.scale) * Weight<T>::of(p, owner.batch, head).at(d)
                           : 0.0f;
        gradient = inverse_sum[h] * gradient - w * mean.slope * excess;
        weight_gradient += inverse_sum[h] * (2 * of_a.of(lane % 4) - of_a.all) - mean.tanh * excess;
      }
      if (exists)
        put(kOwnsKeys ? call.grad_key : call.grad_query, head, token, d, gradient / kFactor);
    }
    if constexpr (!kOwnsKeys) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        weight_gradient += __shfl_xor_sync(~0u, weight_gradient, lanes);
      }
      if (lane < 4 && stripe_of.exists) {
        finite = finite && fabsf(weight_gradient) <= kLargest<float>;
        workspace.weight_parts[stripe_of.index * workspace.centre.features + d] =
            weight_gradient / kFactor;
      }
    }
  }
  if constexpr (kOwnsKeys) {
    const float scale =
        p.dropout_p > 0 ? static_cast<float>(Dropout::make(p.dropout_p, p.philox_state).keep_scale)
                        : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t token = first + e / 2 * 8;
        const int d = quad * 16 + half * 8 + lane % 4 * 2 + e % 2;
        if (token < length && d < p.value_dim) {
          put(call.grad_value, head, token, d, scale / kWeightFactor<T> * value_gradient[half][e]);
        }
      }
    }
  }
  if (__syncthreads_and(finite) == 0 && threadIdx.x == 0) atomicMax(workspace.redo + kv_row, 1U);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
