// Positional encodings.
//
// Additive and rotary encodings share one kernel, rows_kernel. A unit is what a thread owns of a
// row: 16 bytes of columns (for rotated halves, 16 bytes of each half), or one pair where strides
// or sizes do not allow that. What depends on the position only (sines, cosines, a row of a table)
// is made once per unit and position and used for all heads, and for all samples if they share
// their positions. No shared memory, no atomics, no order: each element is written by one thread.
//   grid:  x units, y rows, z parts of the batch (more than one only to fill the device)
//   bound: memory, x read once and out written once; 16-byte accesses, a warp reads 512 bytes of a
//          row or of neighbouring rows.
//
// The gradient of a learned table: a block owns 32 columns of a table row, and 8 threads for each
// of them sum every 8th contribution in order; the 8 sums are added in order. Rows are found in the
// sorted ids by bisection.

#include "kernels/cuda/positional.h"

#include <algorithm>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/positional_rows.cuh"

namespace torch_selfattn::kernels::cuda {

namespace {

constexpr int kThreads = 256;

template <typename Row>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(Row row, RowProblem p, std::int64_t units, bool per_sample, std::int64_t samples) {
  const std::int64_t unit = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (unit >= units) return;
  const std::int64_t begin = blockIdx.z * samples;
  const std::int64_t end = begin + samples < p.batch ? begin + samples : p.batch;
  typename Row::State state = {};
  row.begin(unit, state);
  const std::int64_t step = std::int64_t(gridDim.y) * blockDim.y;
  for (std::int64_t l = std::int64_t(blockIdx.y) * blockDim.y + threadIdx.y; l < p.length;
       l += step) {
    for (std::int64_t b = begin; b < end; ++b) {
      if (b == begin || per_sample) row.move_to(b, l, state);
#pragma unroll 2
      for (std::int64_t h = 0; h < p.heads; ++h) row.apply(b, h, l, state);
    }
  }
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The threads of a block: as many of a row as it has units, the others on the rows that follow.
dim3 block_for(std::int64_t units) {
  unsigned x = 1;
  while (x < units && x < kThreads) x *= 2;
  return dim3(x, kThreads / x);
}

template <typename Row>
cudaError_t run_rows(const Row& row, const RowProblem& p, std::int64_t units, bool per_sample,
                     cudaStream_t stream) {
  constexpr std::int64_t kWantedThreads = 1 << 17;  // 1024 on each of 128 multiprocessors
  constexpr std::int64_t kMaxGrid = 65535;          // of y and z
  const dim3 block = block_for(units);
  const std::int64_t parts = std::clamp<std::int64_t>(divide_up(kWantedThreads, units * p.length),
                                                      1, std::min(p.batch, kMaxGrid));
  const std::int64_t samples = divide_up(p.batch, parts);
  const dim3 grid(static_cast<unsigned>(divide_up(units, block.x)),
                  static_cast<unsigned>(std::min(divide_up(p.length, block.y), kMaxGrid)),
                  static_cast<unsigned>(divide_up(p.batch, samples)));
  return launch(rows_kernel<Row>, grid, block, 0, stream, row, p, units, per_sample, samples);
}

// ---- Tables and their gradient
// --------------------------------------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sinusoid_table_kernel(SinusoidTable p, TurnFrequencies frequencies) {
  using C = compute_t<T>;
  const std::int64_t pair = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (pair >= p.sines) return;
  const double frequency = frequencies.of(pair);
  const std::int64_t step = std::int64_t(gridDim.y) * blockDim.y;
  for (std::int64_t l = std::int64_t(blockIdx.y) * blockDim.y + threadIdx.y; l < p.length;
       l += step) {
    C sine, cosine;
    sincos_turns(static_cast<double>(p.offset + l) * frequency, &sine, &cosine);
    const std::int64_t at = l * p.row_stride + pair * p.pair_stride;
    static_cast<T*>(p.sine)[at] = narrow<T>(sine);
    if (pair < p.cosines) static_cast<T*>(p.cosine)[at] = narrow<T>(cosine);
  }
}

constexpr int kColumns = 32;
constexpr int kSums = kThreads / kColumns;

// The first entry of sorted[0 ... count) that is not less than id.
__device__ __forceinline__ std::int64_t lower_bound(const std::int64_t* sorted, std::int64_t count,
                                                    std::int64_t id) {
  std::int64_t begin = 0;
  while (count > 0) {
    const std::int64_t half = count / 2;
    if (sorted[begin + half] < id) {
      begin += half + 1;
      count -= half + 1;
    } else {
      count = half;
    }
  }
  return begin;
}

template <typename T, typename Table>
__global__ void __launch_bounds__(kThreads) learned_table_grad_kernel(LearnedTableGrad p) {
  using C = compute_t<T>;
  const int x = static_cast<int>(threadIdx.x);
  const int y = static_cast<int>(threadIdx.y);
  C* const sums = shared_at<C>(0, kThreads);  // [kSums][kColumns]
  const std::int64_t column = std::int64_t(blockIdx.x) * kColumns + x;
  for (std::int64_t row = blockIdx.y; row < p.table_rows; row += gridDim.y) {
    const std::int64_t id = row - p.offset;
    std::int64_t entry = 0;
    std::int64_t entries = 0;
    if (p.sorted_ids != nullptr) {
      entry = lower_bound(p.sorted_ids, p.entries, id);
      entries = lower_bound(p.sorted_ids + entry, p.entries - entry, id + 1);
    } else if (id >= 0 && id < p.length) {
      entries = 1;
    }
    const std::int64_t samples = p.per_sample ? 1 : p.batch;
    const std::int64_t per_entry = samples * p.heads;
    C sum = C(0);
    if (column < p.dim) {
      for (std::int64_t t = y; t < entries * per_entry; t += kSums) {
        const std::int64_t place = p.sorted_ids != nullptr ? p.order[entry + t / per_entry] : id;
        const std::int64_t b = p.per_sample ? place / p.length : t % per_entry / p.heads;
        const std::int64_t l = p.per_sample ? place % p.length : place;
        sum += widen(row_of<T>(p.grad, b, t % p.heads, l)[column * p.grad.stride[3]]);
      }
    }
    sums[y * kColumns + x] = sum;
    __syncthreads();
    if (y == 0 && column < p.dim) {
      for (int k = 1; k < kSums; ++k) sum += sums[k * kColumns + x];
      static_cast<Table*>(p.grad_table)[row * p.dim + column] = narrow<Table>(sum);
    }
    __syncthreads();
  }
}

// ---- The types
// ------------------------------------------------------------------------------------

template <typename Body>
cudaError_t with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat64: return body(double());
    case DType::kFloat32: return body(float());
    case DType::kFloat16: return body(__half());
    case DType::kBFloat16: return body(__nv_bfloat16());
  }
  return cudaErrorInvalidValue;
}

bool is_empty(const RowProblem& p) {
  return p.batch == 0 || p.heads == 0 || p.length == 0 || p.dim == 0;
}

// Whether packs of n columns of this type can be read from all rows.
template <typename T>
bool packs(const void* data, const std::int64_t* row_strides, int strides,
           std::int64_t column_stride, std::int64_t n) {
  bool fits = column_stride == 1 && reinterpret_cast<std::uintptr_t>(data) % (n * sizeof(T)) == 0;
  for (int d = 0; d < strides; ++d) fits = fits && row_strides[d] % n == 0;
  return fits;
}
template <typename T>
bool packs(const RowProblem& p, std::int64_t n) {
  return p.dim % n == 0 && packs<T>(p.x.data, p.x.stride, 3, p.x.stride[3], n) &&
         packs<T>(p.out.data, p.out.stride, 3, p.out.stride[3], n);
}

}  // namespace

cudaError_t sinusoid_table(const SinusoidTable& p, cudaStream_t stream) {
  if (p.length == 0 || p.sines == 0) return cudaSuccess;
  return with_type(p.dtype, [&]<typename T>(T) {
    const dim3 block = block_for(p.sines);
    // Several rows for each thread: its frequency costs more than a sine.
    const std::int64_t rows = std::min<std::int64_t>(divide_up(p.length, block.y * 4), 65535);
    const dim3 grid(static_cast<unsigned>(divide_up(p.sines, block.x)),
                    static_cast<unsigned>(rows));
    return launch(sinusoid_table_kernel<T>, grid, block, 0, stream, p,
                  TurnFrequencies(p.frequencies));
  });
}

cudaError_t add_sinusoid(const AddSinusoid& a, cudaStream_t stream) {
  const RowProblem& p = a.rows;
  if (is_empty(p)) return cudaSuccess;
  const TurnFrequencies frequencies({p.dim, a.base, 1.0});
  const bool per_sample = p.positions.per_sample();
  return with_type(p.dtype, [&]<typename T>(T) {
    constexpr int n = 16 / sizeof(T);
    if (packs<T>(p, n)) {
      return run_rows(AddSinusoidRow<T, n, true>{p, frequencies, a.scale}, p, p.dim / n, per_sample,
                      stream);
    }
    return run_rows(AddSinusoidRow<T, 2, false>{p, frequencies, a.scale}, p, divide_up(p.dim, 2),
                    per_sample, stream);
  });
}

namespace {

template <typename T, typename Table>
cudaError_t run_add_learned(const AddLearned& a, cudaStream_t stream) {
  const RowProblem& p = a.rows;
  const auto* table = static_cast<const Table*>(a.table);
  const bool per_sample = p.positions.per_sample();
  // A pack of a float32 table beside half-precision rows would be 32 bytes: half as many columns.
  constexpr int n = 16 / sizeof(Table);
  if (packs<T>(p, n) && packs<Table>(table, a.table_stride, 1, a.table_stride[1], n)) {
    return run_rows(
        AddLearnedRow<T, Table, n, true>{
            p, table, a.table_rows, {a.table_stride[0], a.table_stride[1]}},
        p, p.dim / n, per_sample, stream);
  }
  return run_rows(
      AddLearnedRow<T, Table, 2, false>{
          p, table, a.table_rows, {a.table_stride[0], a.table_stride[1]}},
      p, divide_up(p.dim, 2), per_sample, stream);
}

template <typename T, typename Table>
cudaError_t run_table_grad(const LearnedTableGrad& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(p.dim, kColumns)),
                  static_cast<unsigned>(std::min<std::int64_t>(p.table_rows, 65535)));
  return launch(learned_table_grad_kernel<T, Table>, grid, dim3(kColumns, kSums),
                kThreads * sizeof(compute_t<T>), stream, p);
}

template <typename T, bool interleaved>
cudaError_t run_rotary(const Rotary& r, cudaStream_t stream) {
  // Interleaved, n pairs are one access of 2n columns; halves, two accesses of n columns.
  constexpr int n = interleaved ? 8 / sizeof(T) : 16 / sizeof(T);
  constexpr int columns = interleaved ? 2 * n : n;
  // One table per sample, or one position: what a thread keeps then holds for one sample.
  const bool per_sample =
      r.rows.positions.per_sample() || r.cosine_stride[0] != 0 || r.sine_stride[0] != 0;
  if (r.pairs % n == 0 && r.rows.dim % (2 * n) == 0 && packs<T>(r.rows, columns)) {
    using Row = RotaryRow<T, n, true, interleaved>;
    return run_rows(Row{r}, r.rows, Row::units(r), per_sample, stream);
  }
  using Row = RotaryRow<T, 1, false, interleaved>;
  return run_rows(Row{r}, r.rows, Row::units(r), per_sample, stream);
}

}  // namespace

cudaError_t add_learned(const AddLearned& a, cudaStream_t stream) {
  if (is_empty(a.rows)) return cudaSuccess;
  return with_type(a.rows.dtype, [&]<typename T>(T) {
    if (a.table_dtype == a.rows.dtype) return run_add_learned<T, T>(a, stream);
    if constexpr (sizeof(T) == 2) return run_add_learned<T, float>(a, stream);
    return cudaErrorInvalidValue;
  });
}

cudaError_t learned_table_grad(const LearnedTableGrad& p, cudaStream_t stream) {
  if (p.table_rows == 0 || p.dim == 0) return cudaSuccess;
  return with_type(p.dtype, [&]<typename T>(T) {
    if (p.table_dtype == p.dtype) return run_table_grad<T, T>(p, stream);
    if constexpr (sizeof(T) == 2) return run_table_grad<T, float>(p, stream);
    return cudaErrorInvalidValue;
  });
}

cudaError_t rotary(const Rotary& r, cudaStream_t stream) {
  if (is_empty(r.rows)) return cudaSuccess;
  return with_type(r.rows.dtype, [&]<typename T>(T) {
    return r.interleaved ? run_rotary<T, true>(r, stream) : run_rotary<T, false>(r, stream);
  });
}

}  // namespace torch_selfattn::kernels::cuda
