#pragma once

#include "kernels/cuda/sm80/additive_sines_workspace.h"
#include "kernels/cuda/sm80/fragments.cuh"

// The features of the additive score as a dot product. On an interval tanh is a straight line and a
// few sines (kernels/common/tanh_sines.h), and a sine of a sum is two products:
//
//   tanh(q + k) = s (q + k) + sum_m a_m (sin f_m q cos f_m k + cos f_m q sin f_m k),
//
// so w . tanh(q + k) is a dot product of features, two of each element and term. They are taken
// less constants, about their means over the tokens, which makes their products and the rounding of
// these small:
//
//   sin q cos k = (sin q - n) (cos k - m) + n (cos k - m) + m sin q;
//
// what depends on a query or on a key alone is added up in float32, once per token, as the straight
// line is. With scale and w on the side of the queries, a word of features is
//
//   query  (w a_m (sin f_m q - n),  w a_m (cos f_m q - m'))
//   key    (cos f_m k - m,          sin f_m k - n').
//
// A warp takes four tokens at a time, its lanes the words of a chunk, whose vectors it loads once
// for the four. Counts per word and token: about 24 issue slots, 2 of them MUFU; per word 6 loads.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr float kTurnsOfRadian = 0.159154943f;  // 1 / 2 pi
constexpr float kRadiansOfTurn = 6.28318531f;

// sin and cos of 2 pi t, |t| < 2^22. Within a turn MUFU is good to 2^-20.
__device__ __forceinline__ void sine_and_cosine_of_turns(float t, float& sine, float& cosine) {
  constexpr float kRound = 0x1.8p23f;  // added and taken off again: to the nearest integer
  const float angle = kRadiansOfTurn * (t - ((t + kRound) - kRound));
  sine = __sinf(angle);
  cosine = __cosf(angle);
}

// Tokens that a warp makes features of at once, consecutive ones.
constexpr int kFeatureTokens = 4;

// Features of tokens `first` ... of which those outside `range` count as 0: calls put(token, word,
// two features) for all words, and returns to lane t < kFeatureTokens what depends on token t
// alone.
template <bool kQuery, typename T, typename Put>
__device__ __forceinline__ float make_features(const Tokens<T>& tokens, std::int64_t first,
                                               KeyRange range, int width, const float* vectors,
                                               int words, Put put) {
  const int lane = thread_index_here() % 32;
  const T* const data = tokens.data + first * tokens.token_stride;
  const auto within = [&](std::int64_t token) {
    return static_cast<int>(min(max(token - first, std::int64_t{0}), std::int64_t{kFeatureTokens}));
  };
  const int begin = within(range.begin);
  const int end = within(range.end);
  float alone[kFeatureTokens] = {};
#pragma unroll 1
  for (int group = 0; group * kChunkWords < width; ++group) {
    const int d = group * kChunkWords + lane;
    int word = group * kSineTerms * kChunkWords + lane;
    float x[kFeatureTokens];
    const float line = vectors[kLine * words + word];
#pragma unroll
    for (int t = 0; t < kFeatureTokens; ++t) {
      x[t] = t >= begin && t < end && d < width
                 ? to_acc(data[t * tokens.token_stride + d * tokens.dim_stride])
                 : 0.0f;
      alone[t] += x[t] * line;
    }
#pragma unroll 1
    for (int term = 0; term < kSineTerms; ++term, word += kChunkWords) {
      const auto at = [&](SineVector which) { return vectors[which * words + word]; };
      const float turns = at(kTurns);
      const float query_sine = at(kQuerySine);
      const float query_cosine = at(kQueryCosine);
      const float a = at(kQuery ? kWeight : kKeyCosine);
      const float b = at(kQuery ? kOfSine : kKeySine);
      const float c = kQuery ? at(kOfCosine) : 0.0f;
#pragma unroll
      for (int t = 0; t < kFeatureTokens; ++t) {
        float sine, cosine;
        sine_and_cosine_of_turns(x[t] * turns, sine, cosine);
        if constexpr (kQuery) {
          alone[t] += sine * b + cosine * c;
          put(t, word, pack<T>(sine * a - query_sine, cosine * a - query_cosine));
        } else {
          const float first_feature = cosine - a;
          const float second_feature = sine - b;
          alone[t] += first_feature * query_sine + second_feature * query_cosine;
          put(t, word, pack<T>(first_feature, second_feature));
        }
      }
    }
  }
  float mine = 0;
#pragma unroll
  for (int t = 0; t < kFeatureTokens; ++t) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      alone[t] += __shfl_xor_sync(~0u, alone[t], lanes);
    }
    if (lane == t) mine = alone[t];
  }
  return mine;
}

constexpr int kFeaturesThreads = 256;
constexpr int kFeaturesRows = 64;  // tokens of a block

// Features of all queries, or of all keys, and what depends on one of them alone. A block owns 64
// tokens of one (batch, head), of which a warp takes 8. Features of keys are written by the first
// of the heads that share them. Traffic: tokens once, 24 bytes of features for each of their
// elements, at B H = 64, L = 1024, E = 64 8.4 MB in and 100.7 MB out. Bound: memory, and issue
// slots nearly.
template <typename T, bool kQuery>
__global__ void __launch_bounds__(kFeaturesThreads)
    additive_sines_features_kernel(const __grid_constant__ AttentionProblem p,
                                   const __grid_constant__ SineWorkspace workspace) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t padded = kQuery ? workspace.padded_queries : workspace.padded_keys;
  const std::int64_t blocks = padded / kFeaturesRows;
  const std::int64_t batch_head = blockIdx.x / blocks;
  const std::int64_t batch = batch_head / p.heads;
  const std::int64_t head = batch_head % p.heads;
  const std::int64_t kv_head = head / p.group_size();
  const auto tokens = Tokens<T>::of(kQuery ? p.query : p.key, batch, kQuery ? head : kv_head);
  const KeyRange range = kQuery ? KeyRange{0, p.query_length} : key_range(p, batch);
  const auto words = static_cast<int>(workspace.words);
  const std::int64_t row = kQuery ? batch_head : batch * p.kv_heads + kv_head;
  const bool stores = kQuery || head % p.group_size() == 0;
  constexpr int kRowsOfWarp = kFeaturesRows / (kFeaturesThreads / 32);
#pragma unroll 1
  for (int r = 0; r < kRowsOfWarp; r += kFeatureTokens) {
    const std::int64_t first = blockIdx.x % blocks * kFeaturesRows + warp * kRowsOfWarp + r;
    std::uint32_t* const to = (kQuery ? workspace.query_features : workspace.key_features) +
                              (row * padded + first) * words;
    const float alone =
        make_features<kQuery>(tokens, first, range, static_cast<int>(p.head_dim),
                              workspace.vectors + batch_head * kSineVectors * words, words,
                              [&](int token, int word, std::uint32_t features) {
                                if (stores) to[token * words + word] = features;
                              });
    if (lane < kFeatureTokens) {
      (kQuery ? workspace.query_terms : workspace.key_terms)[batch_head * padded + first + lane] =
          alone;
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
