#pragma once

#include "kernels/cuda/sm80/additive_sines_tile.cuh"

// Additive attention, forward, as a dot product of the features of additive_sines_features.cuh.
//
// A block of 8 warps owns 128 queries of one (batch, head) (64 where there are more than 128
// columns of values) and all columns of the values. Four groups of warps have 32 (16) of the
// queries each, and of a tile of 128 keys one warp of a group has the first, the other the second
// half, with a softmax and an output of its own; these are joined at the end. Scores are made chunk
// by chunk of 64 features: those of the queries are made in the prologue and stay in shared memory,
// where that holds them (kResident, 128 queries of up to 64 elements in 227 KiB), else they are
// read with those of the keys. Chunks of keys, then of values take turns in two slots, filled by
// cp.async a step ahead, a barrier for each. After the last chunk of features: what depends on one
// token is added, then bias, softmax (with a running maximum unless the scores are bounded),
// dropout; after that the chunks of values. A tile that the mask hides from all rows is passed
// over. Heads that the plan leaves, and tiles whose results are not all finite, are left to the
// generic kernel.
//
// Counts at E = Ev = 64, for 128 queries and 128 keys, where 12 chunks are 768 features: 6144 MMA
// of scores and 512 of values; by ldmatrix 6 x 512 bytes for 16 MMA of scores, 1.18 MB, and 64 KiB
// for values; cp.async writes 208 KiB. Features of the keys come from L2, once per block. Bound:
// shared memory and tensor cores alike. docs/kernels.md has the times that follow from these
// counts; none was measured.
namespace torch_selfattn::kernels::cuda::sm80 {

// e^score, and what is summed up of it, is far from the ends of float32 and of bfloat16.
constexpr float kBoundedSineScore = 40;

// Marks the tiles of 64 queries of a block for the generic kernel, or not.
template <int kQueries>
__device__ __forceinline__ void set_redo(const SineWorkspace& workspace, const QueryBlock& block,
                                         const bool (&redo)[kQueries / 64]) {
#pragma unroll
  for (int n = 0; n < kQueries / 64; ++n) {
    const std::int64_t tile = block.query_tile * (kQueries / 64) + n;
    if (tile < workspace.query_tiles) {
      workspace.redo[block.batch_head * workspace.query_tiles + tile] = redo[n] ? 1 : 0;
    }
  }
}

// What mask and slopes say to the scores of the lane's two rows, half of a row at a time, for the
// registers.
template <typename T, int K>
__device__ __forceinline__ void add_biases(float (&s)[2][K], const AttentionProblem& p,
                                           const QueryBlock& block, FragmentPairs pairs) {
  constexpr int kPart = K / 2;
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int h = part / 2;
    const int first = part % 2 * kPart;
    float bias[1][kPart];
    float scores[1][kPart];
    load_biases<T>(bias, p, block.batch, block.head,
                   FragmentPairs{pairs.query + 8 * h, pairs.key + first * 4});
#pragma unroll
    for (int k = 0; k < kPart; ++k) scores[0][k] = s[h][first + k];
    finish_scores(scores, bias, 1.0f);  // the scale is in the features
#pragma unroll
    for (int k = 0; k < kPart; ++k) s[h][first + k] = scores[0][k];
  }
}

// Hides the keys outside of the ranges of the lane's two rows.
template <int K>
__device__ __forceinline__ void hide_keys(float (&s)[2][K], const AttentionProblem& p,
                                          const QueryBlock& block, FragmentPairs pairs) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const KeyRange range = key_range(p, block.batch, pairs.query + 8 * h);
    const auto within = [&](std::int64_t key) {
      return static_cast<int>(min(max(key - pairs.key, std::int64_t{-1}), std::int64_t{4 * K}));
    };
    const int begin = within(range.begin);
    const int end = within(range.end);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int key = k / 2 * 8 + k % 2;
      if (key < begin || key >= end) s[h][k] = -kInfinity<float>;
    }
  }
}

// Joins what two warps have of the same rows, in the registers of the first: `to` and `from` are
// floats in shared memory. Both halves of the block call it.
template <int kRowTiles, int kAll>
__device__ __forceinline__ void join_halves(FragmentSoftmax (&softmax)[kRowTiles],
                                            float (&out)[kRowTiles][kAll][4], float* numbers,
                                            float* statistics) {
  constexpr int kHalf = kSineThreads / 2;
  constexpr int kRound = 8;  // columns of 8 at once
  const int thread = static_cast<int>(threadIdx.x);
  const bool gives = thread >= kHalf;
  const int index = thread % kHalf;
  __syncthreads();  // nobody reads the slots any more
  if (gives) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        statistics[(4 * t + 2 * h) * kHalf + index] = softmax[t].maximum[h];
        statistics[(4 * t + 2 * h + 1) * kHalf + index] = softmax[t].sum[h];
      }
    }
  }
  __syncthreads();
  float mine[kRowTiles][2];
  float other[kRowTiles][2];
  if (!gives) {
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float maximum = statistics[(4 * t + 2 * h) * kHalf + index];
        const float sum = statistics[(4 * t + 2 * h + 1) * kHalf + index];
        const float largest = fmaxf(maximum, softmax[t].maximum[h]);
        const float reference = largest == -kInfinity<float> ? 0.0f : largest;
        mine[t][h] = exp2_approx((softmax[t].maximum[h] - reference) * kLog2E);
        other[t][h] = exp2_approx((maximum - reference) * kLog2E);
        softmax[t].maximum[h] = largest;
        softmax[t].sum[h] = softmax[t].sum[h] * mine[t][h] + sum * other[t][h];
      }
    }
  }
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
    for (int first = 0; first < kAll; first += kRound) {
      if (gives) {
#pragma unroll
        for (int n = 0; n < kRound; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            numbers[(4 * n + i) * kHalf + index] = out[t][first + n][i];
          }
        }
      }
      __syncthreads();
      if (!gives) {
#pragma unroll
        for (int n = 0; n < kRound; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            out[t][first + n][i] = out[t][first + n][i] * mine[t][i / 2] +
                                   numbers[(4 * n + i) * kHalf + index] * other[t][i / 2];
          }
        }
      }
      __syncthreads();
    }
  }
}

template <typename T, int kWidth, int kRowTiles, bool kResident>
__global__ void __launch_bounds__(kSineThreads, 1)
    additive_sines_forward_kernel(const __grid_constant__ AttentionForward call,
                                  const __grid_constant__ SineWorkspace workspace) {
  using Tile = SineTile<kWidth, kRowTiles, kResident>;
  constexpr int K = 2 * kSineColumns;  // keys of a tile that a lane has
  const AttentionProblem& p = call.problem;
  const auto chunks = static_cast<int>(workspace.chunks);
  const auto words = static_cast<int>(workspace.words);
  const int thread = static_cast<int>(threadIdx.x);
  const int first_row = thread / 32 % 4 * 16 * kRowTiles;  // of the warp, in the block
  const int first_column = thread / (kSineThreads / 2) * kWarpKeys;
  constexpr std::uint32_t kNumbers = Tile::kSlotBytes / sizeof(T);  // of a slot
  T* const slots = shared_at<T>(0, 2 * kNumbers);
  QueryBlock& block = *shared_at<QueryBlock>(Tile::kBlockAt, 1);
  float* const key_terms = shared_at<float>(Tile::kKeyTermsAt, 2 * kSineKeys);
  float* const query_terms = shared_at<float>(Tile::kQueryTermsAt, Tile::kQueries);
  T* const queries =
      shared_at<T>(Tile::kQueriesAt, kResident ? chunks * Tile::kQueryBytes / sizeof(T) : 0);

  {
    QueryBlock mine = QueryBlock::of(p, (p.query_length + Tile::kQueries - 1) / Tile::kQueries,
                                     Tile::kQueries, kSineKeys);
    const SineHead head = workspace.heads[mine.batch_head];
    mine.bounded = std::is_same_v<T, __nv_bfloat16> && head.bound <= kBoundedSineScore &&
                   p.mask_kind != MaskKind::kFloat && p.slopes == nullptr;
    if (head.left != 0) {
      const bool all[] = {true, true};
      if (thread == 0) {
        if constexpr (kRowTiles == 2) {
          set_redo<Tile::kQueries>(workspace, mine, all);
        } else {
          set_redo<Tile::kQueries>(workspace, mine, {true});
        }
      }
      return;
    }
    if (thread == 0) block = mine;
  }
  __syncthreads();

  // The first tile from `tile` on of which the mask leaves any pair.
  const auto find_tile = [&](int tile) {
    for (; Tile::kMayBeBiased && p.mask_kind != MaskKind::kNone && tile < block.end_tile; ++tile) {
      bool any = false;
#pragma unroll 1
      for (int n = 0; n < kRowTiles * kSineColumns; ++n) {
        float bias[2][2];
        const int row = first_row + n % kRowTiles * 16 + thread_index_here() % 32 / 4;
        const int key = first_column + n / kRowTiles * 8 + thread_index_here() % 4 * 2;
        any |= load_biases<T>(
            bias, p, block.batch, block.head,
            FragmentPairs{block.first_query + row, std::int64_t{tile} * kSineKeys + key});
      }
      if (__syncthreads_or(any) != 0) break;
    }
    return tile;
  };
  // Starts to load what a step of a tile needs.
  const auto load = [&](int tile, int step, int slot, int terms) {
    T* const to = slots + slot * kNumbers;
    const std::int64_t first_key = std::int64_t{tile} * kSineKeys;
    if (step < chunks) {
      const std::int64_t key = block.kv_row(p) * workspace.padded_keys + first_key;
      copy_features<kSineKeys>(to, workspace.key_features + key * words + step * kChunkWords,
                               words);
      if constexpr (!kResident) {
        const std::int64_t query = block.batch_head * workspace.padded_queries + block.first_query;
        copy_features<Tile::kQueries>(to + kSineKeys * kChunk,
                                      workspace.query_features + query * words + step * kChunkWords,
                                      words);
      }
      const int index = thread_index_here() * 4;
      if (step == 0 && index < kSineKeys) {
        cp_async16(
            key_terms + terms * kSineKeys + index,
            workspace.key_terms + block.batch_head * workspace.padded_keys + first_key + index);
      }
    } else {
      copy_values(to, Tokens<T>::of(p.value, block.batch, block.kv_head), first_key, block.keys,
                  static_cast<std::int64_t>(step - chunks) * kChunk, p.value_dim);
    }
    cp_async_commit();
  };

  int slot = 0;
  int terms = 0;
  int tile = find_tile(block.first_tile);
  if (tile < block.end_tile) load(tile, 0, slot, terms);
  if constexpr (kResident) {
    const auto tokens = Tokens<T>::of(p.query, block.batch, block.head);
    constexpr int kRowsOfWarp = Tile::kQueries / (kSineThreads / 32);
#pragma unroll 1
    for (int r = 0; r < kRowsOfWarp; r += kFeatureTokens) {
      const int row = thread / 32 * kRowsOfWarp + r;
      const float alone = make_features<true>(
          tokens, block.first_query + row, {0, p.query_length}, static_cast<int>(p.head_dim),
          workspace.vectors + std::int64_t{block.batch_head} * kSineVectors * words, words,
          [&](int token, int word, std::uint32_t features) {
            T* const to = queries + word / kChunkWords * Tile::kQueries * kChunk +
                          at_piece(row + token, word % kChunkWords / 4) + word % 4 * 2;
            *reinterpret_cast<std::uint32_t*>(to) = features;
          });
      if (thread % 32 < kFeatureTokens) query_terms[row + thread % 32] = alone;
    }
  } else if (thread < Tile::kQueries) {
    query_terms[thread] =
        workspace
            .query_terms[block.batch_head * workspace.padded_queries + block.first_query + thread];
  }

  FragmentSoftmax softmax[kRowTiles];
  float out[kRowTiles][kWidth / 8][4] = {};
#pragma unroll 1
  while (tile < block.end_tile) {
    const int following = find_tile(tile + 1);
    const int value_chunks = static_cast<int>((p.value_dim + kChunk - 1) / kChunk);
    // Waits for a step, and starts to load the one after it.
    const auto begin_step = [&](int step) {
      cp_async_wait<0>();
      __syncthreads();
      if (step + 1 < chunks + value_chunks) {
        load(tile, step + 1, slot ^ 1, terms);
      } else if (following < block.end_tile) {
        load(following, 0, slot ^ 1, terms ^ 1);
      }
      return slots + slot * kNumbers;
    };
    float scores[kRowTiles][kSineColumns][4] = {};
#pragma unroll 1
    for (int step = 0; step < chunks; ++step) {
      const T* const from = begin_step(step);
      const T* const rows =
          kResident ? queries + step * Tile::kQueries * kChunk : from + kSineKeys * kChunk;
      multiply_features<T>(scores, rows + first_row * kChunk, from + first_column * kChunk);
      slot ^= 1;
    }

    std::uint32_t weights[kRowTiles][K / 4][4];
    const std::int64_t first_key =
        std::int64_t{tile} * kSineKeys + first_column + thread_index_here() % 4 * 2;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
      const int row = first_row + t * 16 + thread_index_here() % 32 / 4;
      const float* const of_keys =
          key_terms + terms * kSineKeys + first_column + thread_index_here() % 4 * 2;
      float s[2][K];
#pragma unroll
      for (int n = 0; n < kSineColumns; ++n) {
        const float2 of_key = *reinterpret_cast<const float2*>(of_keys + 8 * n);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float of_query = query_terms[row + 8 * h];
          s[h][2 * n] = scores[t][n][2 * h] + (of_key.x + of_query);
          s[h][2 * n + 1] = scores[t][n][2 * h + 1] + (of_key.y + of_query);
        }
      }
      const FragmentPairs pairs{block.first_query + row, first_key};
      if (Tile::kMayBeBiased && (p.mask_kind != MaskKind::kNone || p.slopes != nullptr)) {
        add_biases<T>(s, p, block, pairs);
      } else if (tile < block.first_full_tile || tile >= block.end_full_tile) {
        hide_keys(s, p, block, pairs);
      }
      if (block.bounded) {
        softmax[t].add_bounded(s);
      } else {
        float rescale[2];
        softmax[t].update(s, rescale);
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[t][n][i] *= rescale[i / 2];
        }
      }
      if (p.dropout_p > 0) {
        drop(s, Dropout::make(p.dropout_p, p.philox_state), p,
             block.batch_head * p.query_length + block.first_query + row,
             first_key - thread_index_here() % 4 * 2);
      }
      pack_weights<T>(weights[t], s);
    }
#pragma unroll
    for (int v = 0; v < Tile::kValueChunks; ++v) {
      if (v < value_chunks) {
        const T* const from = begin_step(chunks + v);
        add_chunk_of_values<T>(out, v * kPieces, weights, from + first_column * kChunk,
                               static_cast<int>(p.value_dim) - v * kChunk);
        slot ^= 1;
      }
    }
    tile = following;
    terms ^= 1;
  }

#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) softmax[t].join_lanes();
  auto* const numbers = reinterpret_cast<float*>(slots);
  static_assert(Tile::kKeyBytes == kSineThreads / 2 * 32 * sizeof(float));
  join_halves(softmax, out, numbers, numbers + Tile::kKeyBytes / sizeof(float));
  bool finite = true;
  if (thread < kSineThreads / 2) {
    const float kept_scale =
        p.dropout_p > 0 ? static_cast<float>(Dropout::make(p.dropout_p, p.philox_state).keep_scale)
                        : 1.0f;
    const auto rows = OutputRows<T>::of(call.out, block.batch, block.head, p.value_dim);
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::int64_t i = block.first_query + first_row + t * 16 + thread % 32 / 4 + 8 * h;
        const float sum = softmax[t].sum[h];
        const bool empty = sum == 0;
        const float inverse = empty ? 0.0f : kept_scale / sum;
        finite = finite && sum <= kLargest<float>;
#pragma unroll
        for (int n = 0; n < kWidth / 8; ++n) {
          const float x = out[t][n][2 * h] * inverse;
          const float y = out[t][n][2 * h + 1] * inverse;
          finite = finite && fabsf(x) <= kLargest<float> && fabsf(y) <= kLargest<float>;
          if (i < p.query_length) rows.store_pair(i, n * 8 + thread % 4 * 2, x, y);
        }
        if (thread % 4 == 0 && i < p.query_length) {
          static_cast<float*>(call.lse)[block.batch_head * p.query_length + i] =
              empty ? -kInfinity<float> : softmax[t].maximum[h] + logf(sum);
        }
      }
    }
  }
  bool redo[kRowTiles];
#pragma unroll
  for (int n = 0; n < kRowTiles; ++n) {
    redo[n] = __syncthreads_and(finite || first_row / 64 != n) == 0;
  }
  if (thread == 0) set_redo<Tile::kQueries>(workspace, block, redo);
}

}  // namespace torch_selfattn::kernels::cuda::sm80
