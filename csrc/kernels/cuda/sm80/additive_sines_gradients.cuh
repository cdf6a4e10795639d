#pragma once

#include "kernels/cuda/sm80/additive_sines_gradients_tile.cuh"

// Additive attention, backward, as a dot product of the features of additive_sines_features.cuh:
// dq and dw of blocks of queries, dk, dv and dw of blocks of keys.
//
// A block of 8 warps owns 128 rows, queries or keys, and a slice of 64 of their elements (and of
// the columns of the values); it goes over the other side's tokens, the columns, kTiles tiles of
// 128 at a time. Four groups of warps have 32 rows each, one warp of a group the first half of what
// lies across, the other the second. For each tile of columns
//   scores, chunk by chunk of features of rows and columns   -> 32 x 64 pairs in a warp's registers
//   dP, chunk by chunk of dO and of the values               -> the same
//   p = exp(s - lse), g = p (f dP - delta)
//   of keys: p to shared memory, dv += p^T dO
//   g, rounded to bfloat16, to shared memory
// and then, for each chunk of the slice's features, the gradients of the rows' features
//   x, y = sum over the columns of g times the first, the second feature of the columns
// which become those of elements at once, for there are too many to keep: with m, n, m', n' as
// there
//   dq += f_m (cos_q x' - sin_q y'),  x' = x + r m, y' = y + r n',  r = sum_j g,
//   dk += f_m (cos_k y' - sin_k x'),  x' = x + c w a n, y' = y + c w a m',  c = sum_i g,
//   w dw += (cos_k - m) x' + (sin_k - n') y'  (keys)  + r w a (m sin_q + n' cos_q)  (queries)
// with sin_q = w a sin f_m q of the rounded features; the straight line follows at the end. r is
// the gradient of the log-sum-exp whatever the inputs, and taken for it. Sums have a fixed order.
// All chunks come by cp.async, a step ahead, in two slots, with a barrier for each step.
//
// Heads that the plan leaves, and results that are not finite, set redo, and the generic kernel
// does the (batch, key head).
//
// Counts at E = Ev = 64 for 128 rows, 256 columns: MMA 12288 of scores, 1024 of dP, 12288 of x, y
// (1024 of dv). Shared memory reads 192 bytes for an MMA of scores, 256 for one of x, y, takes in
// 1.4 MB; the sums cost about 12 issue slots of a warp per word of its 32 lanes.
namespace torch_selfattn::kernels::cuda::sm80 {

// f(t, h) for the lane's rows 16 t + 8 h.
template <typename F>
__device__ __forceinline__ void for_each_row(F f) {
#pragma unroll
  for (int n = 0; n < 4; ++n) f(n / 2, n % 2);
}

__device__ __forceinline__ void load_four(float (&to)[4], const float4& from) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}
__device__ __forceinline__ void store_four(float4& to, const float (&from)[4]) {
  to = {from[0], from[1], from[2], from[3]};
}

// Of the warp. Read anew by each call, as thread_index_here().
__device__ __forceinline__ int lane_here() { return thread_index_here() % 32; }
__device__ __forceinline__ int half_here() { return thread_index_here() / (kSineThreads / 2); }
__device__ __forceinline__ int first_row_here() { return thread_index_here() / 32 % 4 * 32; }

template <bool kKeys, int kTiles>
__global__ void __launch_bounds__(kSineThreads, 1)
    additive_sines_gradients_kernel(const __grid_constant__ AttentionBackward call,
                                    const __grid_constant__ SineGradientWorkspace workspace) {
  using T = SineNumber;
  using Tile = SineGradientTile<kTiles>;
  constexpr int K = kSineColumns;
  const AttentionProblem& p = call.problem;
  const SineWorkspace& sines = workspace.sines;
  const int thread = static_cast<int>(threadIdx.x);
  const auto chunks = static_cast<int>(sines.chunks);
  const auto words = static_cast<int>(sines.words);
  const int value_chunks = static_cast<int>((p.value_dim + kChunk - 1) / kChunk);
  T* const slots = shared_at<T>(0, 2 * Tile::kSlotNumbers);
  T* const pairs = shared_at<T>(Tile::kPairsAt, Tile::kPairNumbers);
  float* const terms = shared_at<float>(Tile::kTermsAt, Tile::kTerms);
  float4* const statistics = shared_at<float4>(Tile::kStatisticsAt, Tile::kStatistics);
  float* const sums = shared_at<float>(Tile::kSumsAt, Tile::kSums);
  float* const weight_sums = shared_at<float>(Tile::kWeightSumsAt, Tile::kWeightSums);
  SineOperands& here = *shared_at<SineOperands>(Tile::kOperandsAt, 1);

  int head;
  int end_head;
  int first_tile = 0;
  int end_tile = 0;
  int slice;
  {
    const auto owner = SineOwner<kKeys>::of(p, sines);
    const std::int64_t kv_row = owner.batch * p.kv_heads + owner.kv_head;
    bool left = false;  // any of the heads that share the keys
    const std::int64_t group = p.group_size();
    for (std::int64_t h = thread; h < group; h += kSineThreads) {
      left = left || sines.heads[kv_row * group + h].left != 0;
    }
    if (__syncthreads_or(left) != 0) {
      if (thread == 0) atomicMax(workspace.redo + kv_row, 1U);
      return;
    }
    const KeyRange columns = owner.columns(p);
    if (columns.begin < columns.end) {
      first_tile = static_cast<int>(columns.begin / kSineRows);
      end_tile = static_cast<int>((columns.end - 1) / kSineRows) + 1;
    }
    head = owner.first_head;
    end_head = owner.end_head;
    slice = owner.slice;
  }
  const int groups =
      max(0, min(kSliceGroups, static_cast<int>(sines.groups) - slice * kSliceGroups));
  const bool has_values = kKeys && slice < value_chunks;
  const int tile_steps = chunks + value_chunks + (has_values ? 1 : 0);

  const auto row_head_of = [&](int query_head) -> std::int64_t {
    return kKeys ? query_head / p.group_size() : query_head;
  };

  // A thread's own sums, in registers only where they change: gradients of elements, rows 16 t + 8
  // h and words 4 n, then w dw, of words 4 n, and the sums of g of the rows.
  float4* const gradients = shared_at<float4>(Tile::kGradientsAt, Tile::kGradients) + thread;
  const auto gradients_at = [&](int g, int t, int h) -> float4& {
    return gradients[((g * 2 + t) * 2 + h) * kSineThreads];
  };
  const auto weights_at = [&](int g) -> float4& { return gradients[(8 + g) * kSineThreads]; };
  float4& total = gradients[10 * kSineThreads];
#pragma unroll
  for (int n = 0; n < 8; ++n) gradients[n * kSineThreads] = {0, 0, 0, 0};
  float values[2][4][4] = {};  // dv: rows 16 t, columns 8 n
  int slot = 0;

#pragma unroll 1
  for (; head < end_head; ++head) {
    if (thread == 0) {
      here = SineOperands::of(call, workspace, SineOwner<kKeys>::of(p, sines), head);
    }
    __syncthreads();
    if (thread < kSineRows) {
      const std::int64_t padded = kKeys ? sines.padded_keys : sines.padded_queries;
      const std::int64_t row = here.query_row * padded + here.first_row + thread;
      terms[thread] = (kKeys ? sines.key_terms : sines.query_terms)[row];
      if constexpr (!kKeys) statistics[thread] = workspace.statistics[row];
    }

    // Starts to load what a step needs of `count` tiles from `tile` on.
    const auto load = [&](int tile, int count, int step, int to_slot) {
      T* const to = slots + to_slot * Tile::kSlotNumbers;
      const int of_tiles = count * tile_steps;
      if (step >= of_tiles) {
        const int first_word = (slice * kSliceGroups * kSineTerms + step - of_tiles) * kChunkWords;
#pragma unroll 1
        for (int n = 0; n < count; ++n) {
          copy_features<kSineRows>(
              to + n * Tile::kChunkNumbers,
              here.columns + std::int64_t{tile + n} * kSineRows * words + first_word, words);
        }
        copy_features<kSineRows>(to + kTiles * Tile::kChunkNumbers, here.rows + first_word, words);
      } else {
        const bool second = step >= tile_steps;
        const int rest = second ? step - tile_steps : step;
        const std::int64_t first = std::int64_t{tile + (second ? 1 : 0)} * kSineRows;
        if (rest < chunks) {
          copy_features<kSineRows>(to, here.columns + first * words + rest * kChunkWords, words);
          copy_features<kSineRows>(to + Tile::kChunkNumbers, here.rows + rest * kChunkWords, words);
          const int at = second ? kSineRows : 0;
          const int index = thread_index_here();
          if (rest == 0 && index < kSineRows / 4) {
            cp_async16(terms + kSineRows + at + 4 * index, here.terms + first + 4 * index);
          }
          if (kKeys && rest == 0 && index < kSineRows) {
            cp_async16(statistics + at + index, here.statistics + first + index);
          }
        } else {
          const int chunk = rest - chunks < value_chunks ? rest - chunks : slice;
          const std::int64_t column = std::int64_t{chunk} * kChunk;
          copy_values(to, here.column_values, first, here.column_range, column, p.value_dim);
          copy_values(to + Tile::kChunkNumbers, here.row_values, here.first_row, here.row_range,
                      column, p.value_dim);
        }
      }
      cp_async_commit();
    };

    weights_at(0) = weights_at(1) = total = {0, 0, 0, 0};
    if (first_tile < end_tile) load(first_tile, min(kTiles, end_tile - first_tile), 0, slot);
#pragma unroll 1
    for (int tile = first_tile; tile < end_tile; tile += kTiles) {
      const int count = min(kTiles, end_tile - tile);
      const int steps = count * tile_steps + groups * kSineTerms;
      int step = 0;
      // Waits for a step, and starts to load the one after it.
      const auto begin_step = [&] {
        cp_async_wait<0>();
        __syncthreads();
        ++step;
        if (step < steps) {
          load(tile, count, step, slot ^ 1);
        } else if (tile + kTiles < end_tile) {
          load(tile + kTiles, min(kTiles, end_tile - tile - kTiles), 0, slot ^ 1);
        }
        const T* const from = slots + slot * Tile::kSlotNumbers;
        slot ^= 1;
        return from;
      };

      float row_sums[2][2] = {};
#pragma unroll 1
      for (int n = 0; n < count; ++n) {
        float s[2][K][4] = {};
        float dp[2][K][4] = {};
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
          const T* const from = begin_step();
          multiply_features<T>(s, from + Tile::kChunkNumbers + first_row_here() * kChunk,
                               from + half_here() * kWarpKeys * kChunk);
        }
#pragma unroll 1
        for (int chunk = 0; chunk < value_chunks; ++chunk) {
          const T* const from = begin_step();
          multiply_features<T>(dp, from + Tile::kChunkNumbers + first_row_here() * kChunk,
                               from + half_here() * kWarpKeys * kChunk);
        }
        T* const of_tile = pairs + (n * 2 + half_here()) * Tile::kChunkNumbers;
        const auto put_pairs = [&](const std::uint32_t (&packed)[2][2][K]) {
          const int row = first_row_here() + lane_here() / 4;
          const int column = lane_here() % 4 * 2;
#pragma unroll
          for (int t = 0; t < 2; ++t) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
              for (int k = 0; k < K; ++k) {
                T* const to = of_tile + at_piece(row + t * 16 + h * 8, k) + column;
                *reinterpret_cast<std::uint32_t*>(to) = packed[t][h][k];
              }
            }
          }
        };
        std::uint32_t weights[2][2][K];  // p f, of keys
        std::uint32_t changes[2][2][K];  // g
        const std::int64_t first_column = std::int64_t{tile + n} * kSineRows;
        const bool has_bias = p.mask_kind != MaskKind::kNone || p.slopes != nullptr ||
                              !all_are_allowed(p, here.batch, kKeys ? first_column : here.first_row,
                                               kKeys ? here.first_row : first_column);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int row = first_row_here() + t * 16 + lane_here() / 4;
          const int column = half_here() * kWarpKeys + lane_here() % 4 * 2;
          const float* const of_columns = terms + kSineRows * (1 + n) + column;
#pragma unroll
          for (int k = 0; k < K; ++k) {
            const float2 of_column = *reinterpret_cast<const float2*>(of_columns + 8 * k);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float of_row = terms[row + 8 * h];
              s[t][k][2 * h] += of_column.x + of_row;
              s[t][k][2 * h + 1] += of_column.y + of_row;
            }
          }
          const std::int64_t query = kKeys ? first_column + column : here.first_row + row;
          const std::int64_t key = kKeys ? here.first_row + row : first_column + column;
          if (has_bias) add_biases<kKeys>(s[t], p, here.batch, here.head, query, key);
          std::uint32_t kept = ~0U;
          float kept_scale = 1;
          if (p.dropout_p > 0) {
            const auto dropout = Dropout::make(p.dropout_p, p.philox_state);
            kept = draw_kept_pairs<kKeys>(dropout, p, here.query_row * p.query_length, query, key);
            kept_scale = static_cast<float>(dropout.keep_scale);
          }
#pragma unroll
          for (int k = 0; k < K; ++k) {
            float weight[2][2];
            float change[2][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float4 of_query =
                  statistics[kKeys ? n * kSineRows + column + 8 * k + i % 2 : row + i / 2 * 8];
              const float x = exp2_approx((s[t][k][i] - of_query.x) * kLog2E + of_query.y);
              const float factor = is_kept(kept, i / 2, 2 * k + i % 2) ? kept_scale : 0.0f;
              weight[i / 2][i % 2] = x * factor;
              // What is not allowed may be anything.
              change[i / 2][i % 2] = x > 0 ? x * (factor * dp[t][k][i] - of_query.z) : 0.0f;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              row_sums[t][h] += change[h][0] + change[h][1];
              changes[t][h][k] = pack<T>(change[h][0], change[h][1]);
              if constexpr (kKeys) weights[t][h][k] = pack<T>(weight[h][0], weight[h][1]);
            }
          }
        }
        if (has_values) {
          put_pairs(weights);
          const T* const from = begin_step();
#pragma unroll 1
          for (int columns_half = 0; columns_half < 2; ++columns_half) {
            multiply_pairs(
                values,
                pairs + (n * 2 + columns_half) * Tile::kChunkNumbers + first_row_here() * kChunk,
                from + columns_half * kWarpKeys * kChunk, half_here());
          }
          __syncthreads();  // nobody reads p any more
        }
        put_pairs(changes);
      }
      if constexpr (kKeys) {
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            float sum = row_sums[t][h];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if (lane_here() % 4 == 0)
              sums[half_here() * kSineRows + first_row_here() + t * 16 + h * 8 + lane_here() / 4] =
                  sum;
          }
        }
      }

#pragma unroll
      for (int g = 0; g < kSliceGroups; ++g) {
        if (g >= groups) continue;
        float of_group[2][2][4];
        float of_weight[4];
        load_four(of_weight, weights_at(g));
        for_each_row([&](int t, int h) { load_four(of_group[t][h], gradients_at(g, t, h)); });
#pragma unroll 1
        for (int term = 0; term < kSineTerms; ++term) {
          const T* const from = begin_step();
          float xy[2][4][4] = {};
#pragma unroll 1
          for (int n = 0; n < 2 * count; ++n) {
            multiply_pairs(xy, pairs + n * Tile::kChunkNumbers + first_row_here() * kChunk,
                           from + n * kWarpKeys * kChunk, half_here());
          }
          const T* const row_features = from + kTiles * Tile::kChunkNumbers;
          const int half = half_here();
          const int lane = lane_here();
          const int first = first_row_here() + lane / 4;
          const int word = half * 16 + lane % 4;
          const float* const of_word =
              here.vectors + ((slice * kSliceGroups + g) * kSineTerms + term) * kChunkWords + word;
          float of_rows[2][2];  // sums of g that belong to these columns
          for_each_row([&](int t, int h) {
            const int row = first + t * 16 + h * 8;
            of_rows[t][h] = kKeys                ? sums[row] + sums[kSineRows + row]
                            : tile == first_tile ? statistics[row].w
                                                 : 0.0f;
          });
          if (g == 0 && term == 0) {
            float so_far[4];
            load_four(so_far, total);
            for_each_row([&](int t, int h) { so_far[2 * t + h] += of_rows[t][h]; });
            store_four(total, so_far);
          }
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const auto at = [&](SineVector which) { return of_word[which * words + 4 * n]; };
            const float frequency = at(kTurns) * kRadiansOfTurn;
            const float query_sine = at(kQuerySine);
            const float query_cosine = at(kQueryCosine);
            const float key_sine = at(kKeySine);
            const float key_cosine = at(kKeyCosine);
#pragma unroll
            for (int t = 0; t < 2; ++t) {
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const int row = first + t * 16 + h * 8;
                const auto features = *reinterpret_cast<const __nv_bfloat162*>(
                    row_features + at_piece(row, half * 4 + n) + lane % 4 * 2);
                const float first_feature = __bfloat162float(features.x);
                const float second_feature = __bfloat162float(features.y);
                const float sum = of_rows[t][h];
                float x = xy[t][n][2 * h];
                float y = xy[t][n][2 * h + 1];
                float& gradient = of_group[t][h][n];
                if constexpr (kKeys) {
                  x += sum * query_sine;
                  y += sum * query_cosine;
                  gradient += frequency *
                              ((first_feature + key_cosine) * y - (second_feature + key_sine) * x);
                  of_weight[n] += first_feature * x + second_feature * y;
                } else {
                  x += sum * key_cosine;
                  y += sum * key_sine;
                  const float sine = first_feature + query_sine;
                  const float cosine = second_feature + query_cosine;
                  gradient += frequency * (cosine * x - sine * y);
                  of_weight[n] += sum * (sine * key_cosine + cosine * key_sine);
                }
              }
            }
          }
        }
        store_four(weights_at(g), of_weight);
        for_each_row([&](int t, int h) { store_four(gradients_at(g, t, h), of_group[t][h]); });
      }
    }

    // The straight line, and the part of w dw.
    const auto tokens = Tokens<T>::of(kKeys ? p.key : p.query, here.batch, row_head_of(head));

#pragma unroll
    for (int g = 0; g < kSliceGroups; ++g) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int word = half_here() * 16 + 4 * n + lane_here() % 4;
        const int d = (slice * kSliceGroups + g) * kChunkWords + word;
        float sum = reinterpret_cast<const float*>(&weights_at(g))[n];
        if (d < p.head_dim) {
          const float* const at_word =
              here.vectors + (slice * kSliceGroups + g) * kSineTerms * kChunkWords + word;
          const float line = at_word[kLine * words];
          // sum_j c k = sum_j c (k - mean) + mean sum_i r: c is rounded, and may be of large k.
          const float mean = at_word[kKeyMean * words];
          for_each_row([&](int t, int h) {
            const std::int64_t token =
                here.first_row + first_row_here() + t * 16 + h * 8 + lane_here() / 4;
            if (token < here.row_range.begin || token >= here.row_range.end) return;
            const float of_line = line * reinterpret_cast<const float*>(&total)[2 * t + h];
            reinterpret_cast<float*>(&gradients_at(g, t, h))[n] += of_line;
            const float x =
                to_acc(tokens.data[token * tokens.token_stride + d * tokens.dim_stride]);
            sum += of_line * (kKeys ? x - mean : x + mean);
          });
        }
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (lane_here() < 4)
          weight_sums[thread / 32 % 4 * kSliceElements + g * kChunkWords + word] = sum;
      }
    }
    __syncthreads();
    const std::int64_t d = slice * kSliceGroups * kChunkWords + thread;
    if (thread < kSliceElements && d < p.head_dim) {
      float sum = 0;
      for (int n = 0; n < 4; ++n) sum += weight_sums[n * kSliceElements + thread];
      const std::int64_t part =
          (kKeys ? sines.padded_queries / kSineRows : 0) + here.first_row / kSineRows;
      workspace
          .weight_parts[(here.query_row * workspace.weight_parts_of_head + part) * p.head_dim + d] =
          sum;
    }
    __syncthreads();
  }

  const std::int64_t length = kKeys ? p.key_length : p.query_length;
  const std::int64_t row_head = row_head_of(here.head);
  bool finite = true;
  const auto store_one = [&](const View& view, std::int64_t token, std::int64_t d, float x) {
    finite = finite && fabsf(x) <= kLargest<float>;
    store<T>(view, here.batch, row_head, token, d, x);
  };
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::int64_t token =
          here.first_row + first_row_here() + t * 16 + h * 8 + lane_here() / 4;
      if (token >= length) continue;
#pragma unroll
      for (int g = 0; g < kSliceGroups; ++g) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int d =
              (slice * kSliceGroups + g) * kChunkWords + half_here() * 16 + 4 * n + lane_here() % 4;
          if (d < p.head_dim) {
            store_one(kKeys ? call.grad_key : call.grad_query, token, d,
                      (&gradients_at(g, t, h).x)[n]);
          }
        }
      }
      if constexpr (kKeys) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int d = slice * kChunk + half_here() * 32 + n * 8 + lane_here() % 4 * 2 + i;
            if (d < p.value_dim) store_one(call.grad_value, token, d, values[t][n][2 * h + i]);
          }
        }
      }
    }
  }
  if (__syncthreads_and(finite) == 0 && thread == 0) {
    atomicMax(workspace.redo + here.batch * p.kv_heads + here.head / p.group_size(), 1U);
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
