#pragma once

#include "kernels/cuda/numbers.cuh"

// What the generic attention kernels are made of. A block of 256 threads, 16 x 16, works on a tile
// of kTokens "row" tokens by kTokens "column" tokens; each thread has kPerThread x kPerThread of
// its scores. Rows are what the block owns and columns what it loops over: queries and keys in
// forward and for dq, keys and queries for dk and dv. So every product is one of two:
//
//   scores:      s[row][column] = sum_d rows[row][d] columns[column][d]    (add_products)
//   accumulate:  acc[row][d] += sum_column tile[row][column] columns[column][d]   (add_outer)
//                where the tile may be transposed on its way through shared memory
//
// Both take operands staged in shared memory in the accumulation type, kDepth features or kStaged
// tokens at a time, so head dims are unlimited and nothing is instantiated per head dim. A block
// accumulates kWidth output columns; larger head dims take several blocks ("slices"), which repeat
// the scores. Every shared-memory read is of 16 bytes. At float32 a score takes 12 wavefronts of
// shared memory for 16 FMA issue slots of a warp: bound by FMA, not by shared memory.
namespace torch_selfattn::kernels::cuda {

constexpr int kThreads = 256;

template <typename Acc>
struct Tile {
  static constexpr int kPerThread = 16 / sizeof(Acc);  // also the elements of a 16-byte vector
  static constexpr int kTokens = 16 * kPerThread;      // 64 for float, 32 for double
  static constexpr int kDepth = 8 * kPerThread;        // features staged at a time for scores
  static constexpr int kStaged = 8 * kPerThread;       // tokens staged at a time to accumulate
  static constexpr int kWidth = 32 * kPerThread;       // output columns of a block
  // Strides in shared memory. One vector more than needed, or the 8 lanes of a quarter warp, which
  // read 8 rows, would all hit the same banks.
  static constexpr int kDepthStride = kDepth + kPerThread;
  static constexpr int kTileStride = kTokens + kPerThread;
  // Shared memory: two operands for scores, in the same place one to accumulate; the tile; weights.
  static constexpr int kStagingSize = 2 * kTokens * kDepthStride;
  static constexpr int kTileSize = kTokens * kTileStride;
  static constexpr int kSharedBytes =
      (kStagingSize + kTileSize + kDepth) * static_cast<int>(sizeof(Acc));
  static_assert(kStaged * kWidth <= kStagingSize);
  static_assert(16 * kWidth <= kTileSize);

  // Slot s of a tile holds this token of it: the kPerThread slots of a thread, 16 apart to keep
  // shared memory free of conflicts, are consecutive tokens.
  static __device__ __forceinline__ int token_of_slot(int slot) {
    return slot % 16 * kPerThread + slot / 16;
  }
};

struct Thread {
  int row;     // 0 ... 15; its tokens are row * kPerThread ...
  int column;  // 0 ... 15; lanes of half a warp
  static __device__ __forceinline__ Thread me() {
    return {static_cast<int>(threadIdx.x) / 16, static_cast<int>(threadIdx.x) % 16};
  }
};

template <typename Acc>
struct Shared {
  Acc* staging;
  Acc* tile;
  Acc* weight;
  static __device__ __forceinline__ Shared get() {
    using Shape = Tile<Acc>;
    constexpr std::uint32_t tile_at = Shape::kStagingSize * sizeof(Acc);
    constexpr std::uint32_t weight_at = tile_at + Shape::kTileSize * sizeof(Acc);
    return {shared_at<Acc>(0, Shape::kStagingSize), shared_at<Acc>(tile_at, Shape::kTileSize),
            shared_at<Acc>(weight_at, Shape::kDepth)};
  }
};

template <typename Acc>
struct alignas(16) Vector {
  Acc value[Tile<Acc>::kPerThread];
  static __device__ __forceinline__ Vector load(const Acc* from) {
    return *reinterpret_cast<const Vector*>(from);
  }
};

// Tokens [begin, end) of which the tile begins at `first`; outside counts as 0 and is not read.
template <typename T>
struct Side {
  Tokens<T> tokens;
  std::int64_t first;
  std::int64_t begin;
  std::int64_t end;
};

struct Identity {
  template <typename Acc>
  __device__ __forceinline__ Acc operator()(Acc x) const {
    return x;
  }
};

// Copies transform(x) of features [dim, dim_end) of `slots` slots of a side to shared memory, up to
// `columns` of them, zeros beyond. True if one of this thread's elements is not within +-limit.
template <int slots, int columns, int stride, typename T, typename Transform>
__device__ __forceinline__ bool stage(Accumulator<T>* to, const Side<T>& from, int first_slot,
                                      std::int64_t dim, std::int64_t dim_end, Accumulator<T> limit,
                                      Transform transform) {
  using Acc = Accumulator<T>;
  constexpr int kVector = 16 / sizeof(T);
  constexpr int kVectors = columns / kVector;
  bool beyond = false;
#pragma unroll 1  // registers are scarcer than latency is long: other warps hide it
  for (int index = static_cast<int>(threadIdx.x); index < slots * kVectors; index += kThreads) {
    const int slot = index / kVectors;
    const int column = index % kVectors * kVector;
    const std::int64_t token = from.first + Tile<Acc>::token_of_slot(first_slot + slot);
    const std::int64_t d = dim + column;
    const bool inside = token >= from.begin && token < from.end;
    const T* const source = from.tokens.data + token * from.tokens.token_stride;
    Acc* const destination = to + slot * stride + column;
    if (inside && from.tokens.vectorized && d + kVector <= dim_end) {
      alignas(16) T values[kVector];
      *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(source + d);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const Acc x = to_acc(values[v]);
        beyond = beyond || !(fabs(x) <= limit);
        destination[v] = transform(x);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const bool exists = inside && d + v < dim_end;
        const Acc x = exists ? to_acc(source[(d + v) * from.tokens.dim_stride]) : Acc(0);
        beyond = beyond || !(fabs(x) <= limit);
        destination[v] = exists ? transform(x) : Acc(0);
      }
    }
  }
  return beyond;
}

// products[r][c] += sum_d rows[r][d] columns[c][d] over `depth` staged features.
template <typename Acc, int R = Tile<Acc>::kPerThread>
__device__ __forceinline__ void add_products(Acc (&products)[R][R], const Acc* rows,
                                             const Acc* columns, int depth) {
  constexpr int kStride = Tile<Acc>::kDepthStride;
  const Thread me = Thread::me();
#pragma unroll 1
  for (int d = 0; d < depth; d += R) {
    Vector<Acc> a[R];
    Vector<Acc> b[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      a[r] = Vector<Acc>::load(rows + (me.row + 16 * r) * kStride + d);
      b[r] = Vector<Acc>::load(columns + (me.column + 16 * r) * kStride + d);
    }
#pragma unroll
    for (int v = 0; v < R; ++v) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int c = 0; c < R; ++c) products[r][c] += a[r].value[v] * b[c].value[v];
      }
    }
  }
}

// products[r][c] = sum_d rows[r][d] columns[c][d] over all features of two sides. All threads call.
template <typename T, typename Acc, int R>
__device__ __forceinline__ void product_tile(Acc (&products)[R][R], const Side<T>& rows,
                                             const Side<T>& columns, std::int64_t dims,
                                             const Shared<Acc>& shared) {
  using Shape = Tile<Acc>;
  Acc* const column_operand = shared.staging + Shape::kTokens * Shape::kDepthStride;
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < R; ++c) products[r][c] = 0;
  }
  for (std::int64_t dim = 0; dim < dims; dim += Shape::kDepth) {
    __syncthreads();
    stage<Shape::kTokens, Shape::kDepth, Shape::kDepthStride>(shared.staging, rows, 0, dim, dims,
                                                              kInfinity<Acc>, Identity());
    stage<Shape::kTokens, Shape::kDepth, Shape::kDepthStride>(column_operand, columns, 0, dim, dims,
                                                              kInfinity<Acc>, Identity());
    __syncthreads();
    const std::int64_t left = dims - dim;
    add_products(products, shared.staging, column_operand,
                 left < Shape::kDepth ? static_cast<int>(left) : Shape::kDepth);
  }
}

// Puts a thread's part of a tile where all threads can read it as an operand; transposed, its
// columns become the rows.
template <typename Acc, int R>
__device__ __forceinline__ void store_tile(const Acc (&part)[R][R], bool transposed,
                                           const Shared<Acc>& shared) {
  constexpr int kStride = Tile<Acc>::kTileStride;
  const Thread me = Thread::me();
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int c = 0; c < R; ++c) {
      const int row = me.row + 16 * r;
      const int column = me.column + 16 * c;
      shared.tile[transposed ? column * kStride + row : row * kStride + column] = part[r][c];
    }
  }
}

// acc[r][d] += sum of tile[r][column] staged[column][d] over kStaged columns from first_slot on. If
// one of the staged numbers is not finite, weights of 0 are skipped: never 0 * NaN.
template <typename Acc, int R = Tile<Acc>::kPerThread>
__device__ __forceinline__ void add_outer(Acc (&acc)[R][2 * R], const Shared<Acc>& shared,
                                          int first_slot, std::int64_t width, bool skip_zeros) {
  using Shape = Tile<Acc>;
  const Thread me = Thread::me();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half * 16 * R >= width) break;
    const Acc* const operand = shared.staging + (me.column + 16 * half) * R;
#pragma unroll 1
    for (int slot = 0; slot < Shape::kStaged; slot += R) {
      Vector<Acc> weight[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        weight[r] = Vector<Acc>::load(shared.tile + (me.row + 16 * r) * Shape::kTileStride +
                                      first_slot + slot);
      }
#pragma unroll
      for (int v = 0; v < R; ++v) {
        const Vector<Acc> x = Vector<Acc>::load(operand + (slot + v) * Shape::kWidth);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const Acc w = weight[r].value[v];
          if (skip_zeros && w == 0) continue;
#pragma unroll
          for (int e = 0; e < R; ++e) acc[r][half * R + e] += w * x.value[e];
        }
      }
    }
  }
}

// acc[r][d] += sum over all columns of the tile in shared memory. All threads call, after
// store_tile and before anything else.
template <typename T, typename Acc, int R>
__device__ __forceinline__ void accumulate_tile(Acc (&acc)[R][2 * R], const Side<T>& columns,
                                                std::int64_t dim, std::int64_t dims,
                                                const Shared<Acc>& shared) {
  using Shape = Tile<Acc>;
  for (int slot = 0; slot < Shape::kTokens; slot += Shape::kStaged) {
    __syncthreads();
    const bool beyond = stage<Shape::kStaged, Shape::kWidth, Shape::kWidth>(
        shared.staging, columns, slot, dim, dims, kLargest<Acc>, Identity());
    const bool skip_zeros = __syncthreads_or(beyond) != 0;
    add_outer(acc, shared, slot, dims - dim, skip_zeros);
  }
}

// Calls body(r, column in acc, token, feature) for the outputs of this thread that exist.
template <typename Acc, typename Body>
__device__ __forceinline__ void for_each_output(std::int64_t first_token, std::int64_t tokens,
                                                std::int64_t dim, std::int64_t dims, Body body) {
  constexpr int R = Tile<Acc>::kPerThread;
  const Thread me = Thread::me();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const std::int64_t token = first_token + me.row * R + r;
    if (token >= tokens) continue;
#pragma unroll
    for (int e = 0; e < 2 * R; ++e) {
      const std::int64_t d = dim + (me.column + 16 * (e / R)) * R + e % R;
      if (d < dims) body(r, e, token, d);
    }
  }
}

}  // namespace torch_selfattn::kernels::cuda
