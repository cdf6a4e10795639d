#pragma once

#include "kernels/cuda/attention_forward.cuh"

// Backward, generic and deterministic: every output element has one block that owns it, and that
// adds in a fixed order. Launches:
//   1. row statistics: delta_i - grad_lse_i, and maximum and 1/sum by which p is recomputed
//   2. gradients: blocks of three kinds, all of which recompute tiles of p and of the scores'
//      gradient g = p (f dP - delta + grad_lse), two products:
//        keys     own a tile of keys of one (batch, kv head): loop over the group's heads and over
//                 queries; two more products, dv += (p f)^T dO and dk += g^T q
//        queries  own a tile of queries of one (batch, head): loop over keys; dq += g k, and
//                 their parts of the gradients of the additive weight and of the ALiBi slope, to
//                 the workspace
//        mask     own a tile of grad_mask: loop over everything that was broadcast
//   3. for each of weight and slopes: sums the parts, in order
// Traffic: every tile pair reads its operands from L2; g and p never leave the chip. Bound: FMA,
// 7 products of 2 Lq Lk E FLOP; with a mask gradient 9.
namespace torch_selfattn::kernels::cuda {

// What launch 1 leaves in the workspace for each row (b, h, i), and the parts of gradients that
// launch 2 leaves for launch 3.
template <typename Acc>
struct Workspace {
  Acc* maximum;
  Acc* inverse_sum;
  Acc* delta;         // sum_d dO O - grad_lse
  Acc* weight_parts;  // (B, H, query tiles, E), additive only
  Acc* slope_parts;   // (B, H, query tiles), with ALiBi slopes only

  static __host__ __device__ std::int64_t query_tiles(const AttentionProblem& p) {
    return (p.query_length + Tile<Acc>::kTokens - 1) / Tile<Acc>::kTokens;
  }
  static __host__ __device__ std::int64_t weight_part_count(const AttentionProblem& p) {
    if (p.score != ScoreKind::kAdditive) return 0;
    return p.batch * p.heads * query_tiles(p) * p.head_dim;
  }
  static __host__ __device__ std::int64_t bytes(const AttentionProblem& p) {
    const std::int64_t rows = p.batch * p.heads * p.query_length;
    const std::int64_t slope_parts = p.slopes != nullptr ? p.batch * p.heads * query_tiles(p) : 0;
    return (3 * rows + weight_part_count(p) + slope_parts) * static_cast<std::int64_t>(sizeof(Acc));
  }
  static __host__ __device__ Workspace of(const AttentionProblem& p, void* memory) {
    const std::int64_t rows = p.batch * p.heads * p.query_length;
    Acc* const start = static_cast<Acc*>(memory);
    Acc* const weight_parts = start + 3 * rows;
    return {start, start + rows, start + 2 * rows, weight_parts,
            weight_parts + weight_part_count(p)};
  }
};

// p = exp(s - lse) loses accuracy with the magnitude of lse, and at the limits of the range lse
// cannot even hold log(sum). Beyond this, maximum and sum are computed again.
template <typename Acc>
constexpr Acc kLseLimit = std::is_same_v<Acc, double> ? Acc(0x1p38) : Acc(0x1p9);

template <typename T, typename Score>
__global__ void __launch_bounds__(kThreads)
    attention_statistics_kernel(const __grid_constant__ AttentionBackward call, void* memory) {
  using Acc = Accumulator<T>;
  using Shape = Tile<Acc>;
  constexpr int R = Shape::kPerThread;
  const AttentionProblem& p = call.problem;
  const Shared<Acc> shared = Shared<Acc>::get();
  const Workspace<Acc> workspace = Workspace<Acc>::of(p, memory);
  const Thread me = Thread::me();
  const int thread = static_cast<int>(threadIdx.x);

  const std::int64_t tiles = (p.query_length - 1) / Shape::kTokens + 1;
  const std::int64_t first_query = blockIdx.x % tiles * Shape::kTokens;
  const std::int64_t head = blockIdx.x / tiles % p.heads;
  const std::int64_t batch = blockIdx.x / tiles / p.heads;
  const std::int64_t first_row = (batch * p.heads + head) * p.query_length;

  // A warp per row.
  const auto out = Tokens<T>::of(call.out, batch, head);
  const auto grad_out = Tokens<T>::of(call.grad_out, batch, head);
  for (int row = thread / 32; row < Shape::kTokens; row += kThreads / 32) {
    const std::int64_t i = first_query + row;
    if (i >= p.query_length) break;
    Acc delta = 0;
    for (std::int64_t d = thread % 32; d < p.value_dim; d += 32) {
      delta += to_acc(out.data[i * out.token_stride + d * out.dim_stride]) *
               to_acc(grad_out.data[i * grad_out.token_stride + d * grad_out.dim_stride]);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
    if (thread % 32 == 0) {
      const Acc grad_lse =
          call.grad_lse != nullptr ? static_cast<const Acc*>(call.grad_lse)[first_row + i] : Acc(0);
      workspace.delta[first_row + i] = delta - grad_lse;
    }
  }

  const std::int64_t mine = first_query + thread;
  const bool has_row = thread < Shape::kTokens && mine < p.query_length;
  const Acc lse = has_row ? static_cast<const Acc*>(call.lse)[first_row + mine] : Acc(0);
  const bool too_large = fabs(lse) > kLseLimit<Acc> && fabs(lse) < kInfinity<Acc>;
  if (__syncthreads_or(too_large) == 0) {
    if (has_row) {
      workspace.maximum[first_row + mine] = lse;
      workspace.inverse_sum[first_row + mine] = 1;
    }
    return;
  }

  const KeyRange range = key_range_of_tile(p, batch, first_query, Shape::kTokens);
  const std::int64_t kv_head = head / p.group_size();
  const Side<T> queries{Tokens<T>::of(p.query, batch, head), first_query, 0, p.query_length};
  Side<T> keys{Tokens<T>::of(p.key, batch, kv_head), 0, range.begin, range.end};
  const Weight<T> weight = Score::kHasWeight ? Weight<T>::of(p, batch, head) : Weight<T>{};
  OnlineSoftmax<Acc> softmax;
  for (std::int64_t first_key = range.begin / Shape::kTokens * Shape::kTokens;
       first_key < range.end; first_key += Shape::kTokens) {
    Acc bias[R][R];
    const auto pairs = Pairs::of<Acc>(first_query, first_key);
    if (__syncthreads_or(load_biases<T>(bias, p, batch, head, pairs)) == 0) continue;
    keys.first = first_key;
    Acc s[R][R];
    Acc rescale[R];
    Score::score_tile(s, queries, keys, weight, p.head_dim, shared);
    finish_scores(s, bias, static_cast<Acc>(p.scale));
    softmax.update(s, rescale);
  }
  if (me.column == 0) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const std::int64_t i = first_query + me.row * R + r;
      if (i >= p.query_length) continue;
      workspace.maximum[first_row + i] = softmax.maximum[r];
      workspace.inverse_sum[first_row + i] = softmax.sum[r] == 0 ? Acc(0) : 1 / softmax.sum[r];
    }
  }
}

enum class Owner : std::uint8_t { kKeys, kQueries, kMask };

// A block of launch 2: what it owns, and the pairs of tokens that contribute to it.
struct GradientBlock {
  struct Range {
    std::int64_t begin;
    std::int64_t end;
  };
  Owner owner;
  std::int64_t dim;      // the first feature of its slice
  std::int64_t kv_head;  // of a block of keys
  Range batches;
  Range heads;
  Range queries;  // begin is the first token of a tile
  Range keys;

  // The number of blocks; the longest come first.
  struct Count {
    std::int64_t keys;
    std::int64_t queries;
    std::int64_t mask;
    __host__ __device__ std::int64_t total() const { return keys + queries + mask; }
  };

  template <typename Acc>
  static __host__ __device__ std::int64_t tiles(std::int64_t length) {
    return (length + Tile<Acc>::kTokens - 1) / Tile<Acc>::kTokens;
  }
  template <typename Acc>
  static __host__ __device__ std::int64_t slices(std::int64_t dims) {
    return (dims + Tile<Acc>::kWidth - 1) / Tile<Acc>::kWidth;
  }
  // A block of keys has slice n of both dk and dv.
  template <typename Acc>
  static __host__ __device__ std::int64_t key_slices(const AttentionProblem& p) {
    return slices<Acc>(p.head_dim > p.value_dim ? p.head_dim : p.value_dim);
  }

  // Slice 0 has the slope's gradient, without any features as well.
  template <typename Acc>
  static __host__ __device__ std::int64_t query_slices(const AttentionBackward& call) {
    const std::int64_t head_dim = call.problem.head_dim;
    return slices<Acc>(head_dim == 0 && call.grad_slopes != nullptr ? 1 : head_dim);
  }

  // Asked for by leaving out dq; that of an empty one, which has no address either, is no sign of
  // it.
  static __host__ __device__ bool only_mask_gradient(const AttentionBackward& call) {
    const AttentionProblem& p = call.problem;
    return call.grad_query.data == nullptr && p.heads * p.query_length * p.head_dim > 0;
  }

  template <typename Acc>
  static __host__ __device__ Count count(const AttentionBackward& call) {
    const AttentionProblem& p = call.problem;
    const std::int64_t mask_tiles =
        p.mask_size[0] * p.mask_size[1] * tiles<Acc>(p.mask_size[2]) * tiles<Acc>(p.mask_size[3]);
    const bool all = !only_mask_gradient(call);
    return {all ? p.batch * p.kv_heads * tiles<Acc>(p.key_length) * key_slices<Acc>(p) : 0,
            all ? p.batch * p.heads * tiles<Acc>(p.query_length) * query_slices<Acc>(call) : 0,
            call.grad_mask != nullptr ? mask_tiles : 0};
  }

  template <typename Acc>
  static __device__ __forceinline__ GradientBlock of(const AttentionBackward& call,
                                                     std::int64_t index) {
    using Shape = Tile<Acc>;
    const AttentionProblem& p = call.problem;
    const Count blocks = count<Acc>(call);
    const auto next = [&](std::int64_t size) {
      const std::int64_t result = index % size;
      index /= size;
      return result;
    };
    const auto one = [](std::int64_t begin) { return Range{begin, begin + 1}; };
    GradientBlock block{};
    if (index < blocks.keys) {
      block.owner = Owner::kKeys;
      block.dim = next(key_slices<Acc>(p)) * Shape::kWidth;
      block.keys = one(next(tiles<Acc>(p.key_length)) * Shape::kTokens);
      block.kv_head = next(p.kv_heads);
      block.heads = {block.kv_head * p.group_size(), (block.kv_head + 1) * p.group_size()};
      block.batches = one(index);
      block.queries = {0, p.query_length};
    } else if ((index -= blocks.keys) < blocks.queries) {
      block.owner = Owner::kQueries;
      block.dim = next(query_slices<Acc>(call)) * Shape::kWidth;
      block.queries = one(next(tiles<Acc>(p.query_length)) * Shape::kTokens);
      block.heads = one(next(p.heads));
      block.batches = one(index);
      const KeyRange range = key_range_of_tile(p, index, block.queries.begin, Shape::kTokens);
      block.keys = {range.begin / Shape::kTokens * Shape::kTokens, range.end};
    } else {
      // A size of 1 is broadcast, and looped over, or all there is.
      index -= blocks.queries;
      const auto range = [&](std::int64_t begin, std::int64_t size, std::int64_t full) {
        return size == 1 ? Range{0, full} : one(begin);
      };
      block.owner = Owner::kMask;
      block.keys =
          range(next(tiles<Acc>(p.mask_size[3])) * Shape::kTokens, p.mask_size[3], p.key_length);
      block.queries =
          range(next(tiles<Acc>(p.mask_size[2])) * Shape::kTokens, p.mask_size[2], p.query_length);
      block.heads = range(next(p.mask_size[1]), p.mask_size[1], p.heads);
      block.batches = range(index, p.mask_size[0], p.batch);
    }
    return block;
  }
};

// A tile of (p f) and g, rows for queries and columns for keys.
template <typename T, typename Score>
struct GradientTile {
  using Acc = Accumulator<T>;
  static constexpr int R = Tile<Acc>::kPerThread;
  Acc dropped[R][R];   // p f
  Acc gradient[R][R];  // g
  bool note;           // of the score, for accumulate_gradient

  // False, at once, if no pair of the tile is allowed. All threads call.
  __device__ __forceinline__ bool compute(const AttentionBackward& call,
                                          const Workspace<Acc>& workspace,
                                          const DropoutFactors<Acc>& dropout,
                                          const Side<T>& queries, const Side<T>& keys,
                                          const Weight<T>& weight, std::int64_t batch,
                                          std::int64_t head, const Shared<Acc>& shared) {
    const AttentionProblem& p = call.problem;
    const auto pairs = Pairs::of<Acc>(queries.first, keys.first);
    Acc bias[R][R];
    if (__syncthreads_or(load_biases<T>(bias, p, batch, head, pairs)) == 0) return false;

    Acc(&probability)[R][R] = dropped;
    note = Score::score_tile(probability, queries, keys, weight, p.head_dim, shared);
    finish_scores(probability, bias, static_cast<Acc>(p.scale));
    const std::int64_t first_row = (batch * p.heads + head) * p.query_length + pairs.query;
#pragma unroll
    for (int q = 0; q < R; ++q) {
      const bool exists = pairs.query + q < p.query_length;
      const Acc maximum = exists ? workspace.maximum[first_row + q] : Acc(0);
      const Acc inverse_sum = exists ? workspace.inverse_sum[first_row + q] : Acc(0);
#pragma unroll
      for (int k = 0; k < R; ++k) {
        const Acc s = probability[q][k];
        probability[q][k] = s == -kInfinity<Acc> ? Acc(0) : exponential(s - maximum) * inverse_sum;
      }
    }

    // dP, then g in its place.
    const Side<T> grad_out{Tokens<T>::of(call.grad_out, batch, head), queries.first, queries.begin,
                           queries.end};
    const Side<T> values{Tokens<T>::of(p.value, batch, head / p.group_size()), keys.first,
                         keys.begin, keys.end};
    product_tile(gradient, grad_out, values, p.value_dim, shared);
    Acc factor[R][R];
    if (dropout.active) dropout.load(factor, p, batch, head, pairs);
#pragma unroll
    for (int q = 0; q < R; ++q) {
      const Acc delta = pairs.query + q < p.query_length ? workspace.delta[first_row + q] : Acc(0);
#pragma unroll
      for (int k = 0; k < R; ++k) {
        const Acc f = dropout.active ? factor[q][k] : Acc(1);
        const Acc weight_of_pair = probability[q][k];
        const Acc from_output = f == 0 ? Acc(0) : f * gradient[q][k];
        gradient[q][k] = weight_of_pair == 0 ? Acc(0) : weight_of_pair * (from_output - delta);
        dropped[q][k] = f == 0 ? Acc(0) : weight_of_pair * f;
      }
    }
    return true;
  }
};

// Sums over all parts of a block's tile in order, and writes the elements of grad_mask it owns.
template <typename T, typename Acc, int R>
__device__ __forceinline__ void write_mask_gradient(const AttentionBackward& call,
                                                    const GradientBlock& block,
                                                    const Acc (&sum)[R][R],
                                                    const Shared<Acc>& shared) {
  using Shape = Tile<Acc>;
  const AttentionProblem& p = call.problem;
  const Thread me = Thread::me();
  const int thread = static_cast<int>(threadIdx.x);
  const auto element = [&](int row, int column) -> Acc& {
    return shared.tile[row * Shape::kTileStride + column];
  };
  // What was broadcast inside the tile, rows, columns or both, is summed into slot 0.
  __syncthreads();
  store_tile(sum, /*transposed=*/false, shared);
  __syncthreads();
  if (p.mask_size[2] == 1 && thread < Shape::kTokens) {
    for (int row = 1; row < Shape::kTokens; ++row) element(0, thread) += element(row, thread);
  }
  __syncthreads();
  if (p.mask_size[3] == 1 && thread < Shape::kTokens) {
    for (int column = 1; column < Shape::kTokens; ++column) {
      element(thread, 0) += element(thread, column);
    }
  }
  __syncthreads();
  const std::int64_t batch = p.mask_size[0] == 1 ? 0 : block.batches.begin;
  const std::int64_t head = p.mask_size[1] == 1 ? 0 : block.heads.begin;
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < R; ++c) {
      const std::int64_t i = block.queries.begin + me.row * R + r;
      const std::int64_t j = block.keys.begin + me.column * R + c;
      if (i >= p.mask_size[2] || j >= p.mask_size[3]) continue;
      const Acc value = element(me.row + 16 * r, me.column + 16 * c);
      const std::int64_t at =
          ((batch * p.mask_size[1] + head) * p.mask_size[2] + i) * p.mask_size[3] + j;
      if (p.mask_dtype != p.dtype) {
        static_cast<float*>(call.grad_mask)[at] = static_cast<float>(value);
      } else {
        static_cast<T*>(call.grad_mask)[at] = from_acc<T>(value);
      }
    }
  }
}

// The three kinds of blocks share one loop, so that the tiles' code is there once.
template <typename T, typename Score>
__global__ void __launch_bounds__(kThreads)
    attention_backward_kernel(const __grid_constant__ AttentionBackward call, void* memory,
                              const std::uint32_t* wanted) {
  using Acc = Accumulator<T>;
  using Shape = Tile<Acc>;
  constexpr int R = Shape::kPerThread;
  const AttentionProblem& p = call.problem;
  const auto workspace = Workspace<Acc>::of(p, memory);
  const auto block = GradientBlock::of<Acc>(call, blockIdx.x);
  if (wanted != nullptr &&
      wanted[block.batches.begin * p.kv_heads + block.heads.begin / p.group_size()] == 0) {
    return;
  }
  const Shared<Acc> shared = Shared<Acc>::get();
  const auto dropout = DropoutFactors<Acc>::of(p);
  const Thread me = Thread::me();
  const bool owns_keys = block.owner == Owner::kKeys;
  const bool wants_slope =
      block.owner == Owner::kQueries && block.dim == 0 && call.grad_slopes != nullptr;

  Acc grad_token[R][2 * R] = {};  // dk or dq
  Acc grad_value[R][2 * R] = {};  // of a block of keys
  Acc grad_weight[2 * R] = {};    // of a block of queries
  Acc grad_mask[R][R] = {};       // of a block of the mask
  Acc grad_slope = 0;             // of a block of queries, without the sign
  for (std::int64_t batch = block.batches.begin; batch < block.batches.end; ++batch) {
    for (std::int64_t head = block.heads.begin; head < block.heads.end; ++head) {
      const std::int64_t kv_head = head / p.group_size();
      const Weight<T> weight = Score::kHasWeight ? Weight<T>::of(p, batch, head) : Weight<T>{};
      for (std::int64_t query = block.queries.begin; query < block.queries.end;
           query += Shape::kTokens) {
        const KeyRange range = key_range_of_tile(p, batch, query, Shape::kTokens);
        for (std::int64_t key = block.keys.begin; key < block.keys.end; key += Shape::kTokens) {
          if (range.end <= key || range.begin >= key + Shape::kTokens) continue;
          const Side<T> queries{Tokens<T>::of(p.query, batch, head), query, 0, p.query_length};
          const Side<T> keys{Tokens<T>::of(p.key, batch, kv_head), key, range.begin, range.end};
          GradientTile<T, Score> tile;
          if (!tile.compute(call, workspace, dropout, queries, keys, weight, batch, head, shared)) {
            continue;
          }
          if (block.owner == Owner::kMask) {
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int c = 0; c < R; ++c) grad_mask[r][c] += tile.gradient[r][c];
            }
            continue;
          }
          if (wants_slope) {
            const auto distances = Distances<Acc>::of(p, batch, Pairs::of<Acc>(query, key));
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int c = 0; c < R; ++c) grad_slope += tile.gradient[r][c] * distances.at(r, c);
            }
          }
          if (owns_keys && block.dim < p.value_dim) {
            const Side<T> grad_out{Tokens<T>::of(call.grad_out, batch, head), query, 0,
                                   p.query_length};
            store_tile(tile.dropped, /*transposed=*/true, shared);
            accumulate_tile(grad_value, grad_out, block.dim, p.value_dim, shared);
            __syncthreads();
          }
          if (block.dim < p.head_dim) {
            store_tile(tile.gradient, owns_keys, shared);
            Score::accumulate_gradient(grad_token, grad_weight, !owns_keys,
                                       owns_keys ? keys : queries, owns_keys ? queries : keys,
                                       weight, block.dim, p.head_dim, tile.note, shared);
          }
        }
      }
    }
  }

  if (block.owner == Owner::kMask) {
    write_mask_gradient<T>(call, block, grad_mask, shared);
    return;
  }
  const std::int64_t batch = block.batches.begin;
  const std::int64_t head = block.heads.begin;
  const Acc scale = static_cast<Acc>(p.scale);
  if (owns_keys) {
    const std::int64_t kv_head = block.kv_head;
    for_each_output<Acc>(block.keys.begin, p.key_length, block.dim, p.head_dim,
                         [&](int r, int e, std::int64_t j, std::int64_t d) {
                           store<T>(call.grad_key, batch, kv_head, j, d, scale * grad_token[r][e]);
                         });
    for_each_output<Acc>(block.keys.begin, p.key_length, block.dim, p.value_dim,
                         [&](int r, int e, std::int64_t j, std::int64_t d) {
                           store<T>(call.grad_value, batch, kv_head, j, d, grad_value[r][e]);
                         });
    return;
  }
  for_each_output<Acc>(block.queries.begin, p.query_length, block.dim, p.head_dim,
                       [&](int r, int e, std::int64_t i, std::int64_t d) {
                         store<T>(call.grad_query, batch, head, i, d, scale * grad_token[r][e]);
                       });
  const std::int64_t part = (batch * p.heads + head) * Workspace<Acc>::query_tiles(p) +
                            block.queries.begin / Shape::kTokens;
  if (wants_slope) {  // the block's part: sum over the warps, then over their lanes' sums
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      grad_slope += __shfl_xor_sync(~0u, grad_slope, lanes);
    }
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.x);
    if (thread % 32 == 0) shared.tile[thread / 32] = grad_slope;
    __syncthreads();
    if (thread == 0) {
      Acc sum = 0;
      for (int warp = 0; warp < kThreads / 32; ++warp) sum += shared.tile[warp];
      workspace.slope_parts[part] = sum;
    }
  }
  if constexpr (Score::kHasWeight) {  // the block's part: sum over the 16 thread rows, in order
    __syncthreads();
#pragma unroll
    for (int e = 0; e < 2 * R; ++e) {
      shared.tile[me.row * Shape::kWidth + (me.column + 16 * (e / R)) * R + e % R] = grad_weight[e];
    }
    __syncthreads();
    const int column = static_cast<int>(threadIdx.x);
    if (column < Shape::kWidth && block.dim + column < p.head_dim) {
      Acc sum = 0;
      for (int row = 0; row < 16; ++row) sum += shared.tile[row * Shape::kWidth + column];
      workspace.weight_parts[part * p.head_dim + block.dim + column] = sum;
    }
  }
}

// What launch 3 adds up: parts (B, H, tiles, columns) of a gradient (B or 1, H or 1, columns).
template <typename Acc>
struct PartialSums {
  const Acc* parts;
  std::int64_t batch;
  std::int64_t heads;
  std::int64_t tiles;
  std::int64_t columns;
  std::int64_t size[2];  // of the gradient's first two dimensions
  Acc factor;
  int block_columns;  // a divisor of kThreads

  __host__ __device__ std::int64_t column_blocks() const {
    return (columns + block_columns - 1) / block_columns;
  }
};

// gradient[b or 0, h or 0, d] = factor * the sum of its parts. A block has block_columns columns of
// one row of the gradient; the other threads share them.
template <typename Acc, typename Out>
__global__ void __launch_bounds__(kThreads)
    attention_sum_parts_kernel(const __grid_constant__ PartialSums<Acc> call, Out* gradient) {
  Acc* const sums = shared_at<Acc>(0, kThreads);  // [lanes][block_columns]
  const int lanes = kThreads / call.block_columns;
  const int lane = static_cast<int>(threadIdx.x) / call.block_columns;
  const int column = static_cast<int>(threadIdx.x) % call.block_columns;
  const std::int64_t d = blockIdx.x % call.column_blocks() * call.block_columns + column;
  const std::int64_t row = blockIdx.x / call.column_blocks();  // of the gradient
  const std::int64_t first_head = row % call.size[1];
  const std::int64_t first_batch = row / call.size[1];
  const std::int64_t heads = call.size[1] == 1 ? call.heads : 1;
  const std::int64_t batches = call.size[0] == 1 ? call.batch : 1;
  Acc sum = 0;
  if (d < call.columns) {
    for (std::int64_t part = lane; part < batches * heads * call.tiles; part += lanes) {
      const std::int64_t tile = part % call.tiles;
      const std::int64_t head = first_head + part / call.tiles % heads;
      const std::int64_t batch = first_batch + part / call.tiles / heads;
      sum += call.parts[((batch * call.heads + head) * call.tiles + tile) * call.columns + d];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0 && d < call.columns) {
    for (int other = 1; other < lanes; ++other) sum += sums[other * call.block_columns + column];
    gradient[row * call.columns + d] = from_acc<Out>(call.factor * sum);
  }
}

}  // namespace torch_selfattn::kernels::cuda
