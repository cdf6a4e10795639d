#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/common/tanh_sines.h"
#include "kernels/cuda/sm80/additive_tensor_cores.h"
#include "kernels/cuda/sm80/carver.h"

// Sizes of the additive score as dot products of sines, and what its kernels leave for one another.
//
// A pair of features is a word of two 16-bit numbers, and a chunk of 32 words, 128 bytes of a
// token, the unit of all loops over them: chunk g N + m has term m of N of the elements 32 g ... 32
// g + 31, zeros behind the last.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kSineTerms = 6;
constexpr int kChunkWords = 32;
constexpr int kChunk = 2 * kChunkWords;  // features
constexpr int kSineKeys = 128;           // of a tile; tokens are padded to a multiple of it
constexpr int kMostSineElements = kMostAdditiveElements;
constexpr int kMostSineValues = kMostAdditiveValues;

// The fits of so many terms, by their limits.
struct SineFits {
  static constexpr int kMost = 16;
  TanhSines fit[kMost] = {};
  int count = 0;

  static constexpr SineFits of(int terms) {
    SineFits fits;
    for (const TanhSines& fit : kTanhSines) {
      if (fit.terms == terms) fits.fit[fits.count++] = fit;
    }
    return fits;
  }
};

// What the features of a head are made with: vectors over the words.
enum SineVector : int {
  kTurns,        // f_m / 2 pi
  kLine,         // scale w s for term 0, else 0
  kWeight,       // scale w a_m
  kQuerySine,    // scale w a_m n
  kQueryCosine,  // scale w a_m m'
  kKeyCosine,    // m
  kKeySine,      // n'
  kOfSine,       // scale w a_m m, what a sine of the query counts by itself
  kOfCosine,     // scale w a_m n'
  kOfElement,    // scale w, never 0: the gradient of w is divided by it
  kKeyMean,      // of the element
  kSineVectors
};

struct SineHead {
  float bound;         // |scale| |w|_1, which no score exceeds
  std::uint32_t left;  // 1: the generic kernel takes it
};

struct SineWorkspace {
  std::int64_t groups = 0;  // of 32 elements
  std::int64_t chunks = 0;
  std::int64_t words = 0;        // with those behind the last
  std::int64_t query_parts = 0;  // of the tokens, for their moments
  std::int64_t key_parts = 0;
  std::int64_t padded_queries = 0;
  std::int64_t padded_keys = 0;
  std::int64_t query_tiles = 0;  // of the generic kernel

  float* query_moments = nullptr;         // (B, H, query_parts, 4, E)
  float* key_moments = nullptr;           // (B, Hk, key_parts, 4, E)
  SineHead* heads = nullptr;              // (B, H)
  float* vectors = nullptr;               // (B, H, kSineVectors, words)
  std::uint32_t* key_features = nullptr;  // (B, Hk, padded_keys, words)
  float* key_terms = nullptr;             // (B, H, padded_keys): what depends on a key alone
  std::uint32_t* query_features =
      nullptr;                   // (B, H, padded_queries, words), null: made in the block
  float* query_terms = nullptr;  // (B, H, padded_queries)
  std::uint8_t* redo = nullptr;  // (B, H, query_tiles): 1 for a tile that the generic kernel takes
  std::int64_t bytes = 0;

  static SineWorkspace of(const AttentionProblem& p, bool query_features, void* memory) {
    Carver carver(memory);
    return of(p, query_features, carver);
  }
  static SineWorkspace of(const AttentionProblem& p, bool query_features, Carver& carver) {
    SineWorkspace w;
    w.groups = (p.head_dim + kChunkWords - 1) / kChunkWords;
    w.chunks = w.groups * kSineTerms;
    w.words = w.chunks * kChunkWords;
    w.query_parts = parts(p.query_length);
    w.key_parts = parts(p.key_length);
    w.padded_queries = padded(p.query_length);
    w.padded_keys = padded(p.key_length);
    w.query_tiles = (p.query_length + 63) / 64;
    const std::int64_t heads = p.batch * p.heads;
    const std::int64_t kv_heads = p.batch * p.kv_heads;
    w.query_moments = carver.take<float>(heads * w.query_parts * 4 * p.head_dim);
    w.key_moments = carver.take<float>(kv_heads * w.key_parts * 4 * p.head_dim);
    w.heads = carver.take<SineHead>(heads);
    w.vectors = carver.take<float>(heads * kSineVectors * w.words);
    w.key_features = carver.take<std::uint32_t>(kv_heads * w.padded_keys * w.words);
    w.key_terms = carver.take<float>(heads * w.padded_keys);
    if (query_features) {
      w.query_features = carver.take<std::uint32_t>(heads * w.padded_queries * w.words);
      w.query_terms = carver.take<float>(heads * w.padded_queries);
    }
    w.redo = carver.take<std::uint8_t>(heads * w.query_tiles);
    w.bytes = carver.bytes();
    return w;
  }

 private:
  static constexpr std::int64_t kPartTokens = 128;
  static constexpr std::int64_t kMostParts = 32;
  static std::int64_t parts(std::int64_t tokens) {
    const std::int64_t n = (tokens + kPartTokens - 1) / kPartTokens;
    return n > kMostParts ? kMostParts : n;
  }
  static std::int64_t padded(std::int64_t tokens) {
    return (tokens + kSineKeys - 1) / kSineKeys * kSineKeys;
  }
};

}  // namespace torch_selfattn::kernels::cuda::sm80
