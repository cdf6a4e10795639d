#pragma once

#include "kernels/cuda/sm80/additive_sines_features.cuh"

// What the forward kernel of the additive score as a dot product is made of: its shared memory and
// the products of a chunk, by warps of 16 or 32 queries and 64 keys.
// Chunks lie as rows of 128 bytes, of a token's 64 features or of a key's 64 columns of values.
// Their eight pieces of 16 bytes are swizzled by the row, ldmatrix reads eight rows at once.
namespace torch_selfattn::kernels::cuda::sm80 {

constexpr int kSineThreads = 256;  // 8 warps: 4 groups of rows by 2 halves of the keys
constexpr int kWarpKeys = kSineKeys / 2;
constexpr int kSineColumns = kWarpKeys / 8;
constexpr int kPieces = 8;
constexpr int kRowBytes = 128;

// Rows of the queries of a warp, in units of 16: what the registers hold beside the output.
// `biased`: with a mask or slopes, whose bias takes some too.
TSA_HOST_DEVICE constexpr int sine_row_tiles(std::int64_t value_dim, bool biased) {
  return value_dim <= (biased ? 64 : 128) ? 2 : 1;
}

// Shared memory of a block, in this order: two slots of a chunk each, QueryBlock, terms of the keys
// of two tiles, terms of the queries, features of the queries if they stay. Else a slot has a chunk
// of these too.
template <int kWidth, int kTiles, bool kResident>
struct SineTile {
  static constexpr int kRowTiles = kTiles;
  static constexpr int kQueries = 64 * kTiles;
  static constexpr bool kMayBeBiased = kTiles <= sine_row_tiles(kWidth, true);
  static constexpr int kValueChunks = kWidth / kChunk;
  static constexpr std::uint32_t kKeyBytes = kSineKeys * kRowBytes;
  static constexpr std::uint32_t kQueryBytes = kQueries * kRowBytes;  // of a chunk
  static constexpr std::uint32_t kSlotBytes = kKeyBytes + (kResident ? 0 : kQueryBytes);
  static constexpr std::uint32_t kBlockAt = 2 * kSlotBytes;
  static constexpr std::uint32_t kKeyTermsAt = kBlockAt + sizeof(QueryBlock);
  static constexpr std::uint32_t kQueryTermsAt = kKeyTermsAt + 2 * kSineKeys * sizeof(float);
  static constexpr std::uint32_t kQueriesAt =
      (kQueryTermsAt + kQueries * sizeof(float) + kRowBytes - 1) / kRowBytes * kRowBytes;
  static constexpr std::int64_t shared_bytes(std::int64_t chunks) {
    return kQueriesAt + (kResident ? chunks * kQueryBytes : 0);
  }
};

// Where a piece of a row of a chunk lies, in 16-bit numbers.
__device__ __forceinline__ int at_piece(int row, int piece) {
  return row * kChunk + (piece ^ (row % kPieces)) * 8;
}

// s += products of a chunk of features, of the warp's rows and keys.
template <typename T, int kRowTiles>
__device__ __forceinline__ void multiply_features(float (&s)[kRowTiles][kSineColumns][4],
                                                  const T* queries, const T* keys) {
  const int lane = thread_index_here() % 32;
  // ldmatrix: of the queries rows 0-15 of two pieces, of the keys two pieces of rows 0-7 and 8-15.
  const std::uint32_t query = shared_address(queries + at_piece(lane % 16, lane / 16));
  const std::uint32_t key = shared_address(keys + at_piece(lane / 16 * 8 + lane % 8, lane / 8 % 2));
#pragma unroll
  for (int k = 0; k < kChunk / 16; ++k) {
    const std::uint32_t piece = k * 32;  // swizzled by the lane's row, as that of its address is
    std::uint32_t a[kRowTiles][4];
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t) ldmatrix(a[t], (query ^ piece) + t * 16 * kRowBytes);
#pragma unroll
    for (int n = 0; n < kSineColumns / 2; ++n) {
      std::uint32_t b[4];
      ldmatrix(b, (key ^ piece) + n * 16 * kRowBytes);
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t) {
        mma_m16n8k16<T>(s[t][2 * n], a[t], {b[0], b[1]});
        mma_m16n8k16<T>(s[t][2 * n + 1], a[t], {b[2], b[3]});
      }
    }
  }
}

// out += weights V, of the warp's rows and keys and a chunk of columns.
template <typename T, int kRowTiles, int kAll>
__device__ __forceinline__ void add_chunk_of_values(
    float (&out)[kRowTiles][kAll][4], int first,
    const std::uint32_t (&weights)[kRowTiles][kWarpKeys / 16][4], const T* values, int columns) {
  const int lane = thread_index_here() % 32;
  const std::uint32_t value = shared_address(values + at_piece(lane % 16, lane / 16));
#pragma unroll
  for (int n = 0; n < kPieces / 2; ++n) {
    if (n * 16 < columns) {
#pragma unroll
      for (int step = 0; step < kWarpKeys / 16; ++step) {
        std::uint32_t b[4];
        ldmatrix<true>(b, (value ^ (n * 32)) + step * 16 * kRowBytes);
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t) {
          mma_m16n8k16<T>(out[t][first + 2 * n], weights[t][step], {b[0], b[1]});
          mma_m16n8k16<T>(out[t][first + 2 * n + 1], weights[t][step], {b[2], b[3]});
        }
      }
    }
  }
}

// Copies a chunk of rows from the features of `words` each to shared memory.
template <int kRows, typename T>
__device__ __forceinline__ void copy_features(T* to, const std::uint32_t* from,
                                              std::int64_t words) {
  constexpr int kRowsAtOnce = kSineThreads / kPieces;
  const int thread = thread_index_here();
  const int row = thread / kPieces;
  const int piece = thread % kPieces;
  from += row * words + piece * 4;
  to += at_piece(row, piece);
#pragma unroll
  for (int r = 0; r < kRows; r += kRowsAtOnce) {
    cp_async16(to + r * kChunk, from + r * words);
  }
}

// Columns [first, first + 64) of the values of a tile of keys, zeros for those outside `range` and
// for columns beyond `dims`.
template <typename T>
__device__ __forceinline__ void copy_values(T* to, const Tokens<T>& values, std::int64_t first_key,
                                            KeyRange range, std::int64_t first, std::int64_t dims) {
  constexpr int kRowsAtOnce = kSineThreads / kPieces;
  const int thread = thread_index_here();
  const int row = thread / kPieces;
  const int piece = thread % kPieces;
  const std::int64_t column = first + piece * 8;
  const T* from = values.data + (first_key + row) * values.token_stride;
  to += at_piece(row, piece);
#pragma unroll
  for (int r = 0; r < kSineKeys; r += kRowsAtOnce) {
    const std::int64_t key = first_key + row + r;
    const bool inside = key >= range.begin && key < range.end;
    T* const destination = to + r * kChunk;
    if (values.vectorized && dims % 8 == 0) {
      const bool read = inside && column < dims;
      cp_async16(destination, read ? from + column : values.data, read);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8; ++e) {
        destination[e] = inside && column + e < dims ? from[(column + e) * values.dim_stride]
                                                     : from_acc<T>(0.0f);
      }
    }
    from += kRowsAtOnce * values.token_stride;
  }
}

}  // namespace torch_selfattn::kernels::cuda::sm80
