// Positional encodings on the CPU, written once and compiled once per instruction set: the file
// that includes this one names the namespace (TSA_INSTRUCTION_SET).
//
// Every kernel walks over rows of D elements. A task is a block of rows of about kTaskElements;
// each thread takes the next task as it becomes free, each row is written by one task, and what is
// written does not depend on how the rows were cut. Rows are computed in float32 (float64 for
// float64): other dtypes and strided rows pass through a scratch row that stays in the first-level
// cache, so the bound is memory: x read once, out written once.
//
// Sines and cosines come from one pair of library calls per 32 positions and a complex product in
// float64 for each, see Sinusoids: about as long as adding a row to three samples.

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "kernels/cpu/positional.h"
#include "kernels/cpu/sinusoids.h"

namespace torch_selfattn::kernels::cpu::TSA_INSTRUCTION_SET {

namespace {

constexpr std::int64_t kTaskElements = 1 << 15;

template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// body(T()) with the element type that dtype stands for.
template <typename Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat64: return body(double());
    case DType::kFloat32: return body(float());
    case DType::kFloat16: return body(float16());
    case DType::kBFloat16: return body(bfloat16());
  }
}

// ---- Rows ---------------------------------------------------------------------------------------

template <typename T, typename C>
void widen(const T* x, C* y, std::int64_t n) {
  std::int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float16>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
      _mm256_storeu_ps(y + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) y[i] = static_cast<C>(x[i]);
}

template <typename T, typename C>
void narrow(const C* x, T* y, std::int64_t n) {
  std::int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float16>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), half);
    }
  }
#endif
  for (; i < n; ++i) y[i] = static_cast<T>(x[i]);
}

// n elements at row as the compute type: in place, or converted into scratch.
template <typename C, typename T>
const C* read_row(const T* row, std::int64_t stride, std::int64_t n, C* scratch) {
  if (stride == 1) {
    if constexpr (std::is_same_v<T, C>) return row;
    widen(row, scratch, n);
    return scratch;
  }
  for (std::int64_t i = 0; i < n; ++i) scratch[i] = static_cast<C>(row[i * stride]);
  return scratch;
}

// Where to compute a row that write_row then brings to its place.
template <typename C, typename T>
C* target_row(T* row, std::int64_t stride, C* scratch) {
  if constexpr (std::is_same_v<T, C>) {
    if (stride == 1) return row;
  }
  return scratch;
}

template <typename C, typename T>
void write_row(const C* computed, T* row, std::int64_t stride, std::int64_t n) {
  if (stride == 1) {
    if constexpr (!std::is_same_v<T, C>) narrow(computed, row, n);
    return;  // of the same type: computed in place
  }
  for (std::int64_t i = 0; i < n; ++i) row[i * stride] = static_cast<T>(computed[i]);
}

template <typename T>
const T* row_of(const ConstView& view, std::int64_t b, std::int64_t h, std::int64_t l) {
  return static_cast<const T*>(view.data) + b * view.stride[0] + h * view.stride[1] +
         l * view.stride[2];
}
template <typename T>
T* row_of(const View& view, std::int64_t b, std::int64_t h, std::int64_t l) {
  return static_cast<T*>(view.data) + b * view.stride[0] + h * view.stride[1] + l * view.stride[2];
}

// Calls body(h, l) for all heads and for l in [begin, end), in the order in which they lie in
// memory: for (B, L, H, D) storage heads first, for (B, H, L, D) rows first.
template <typename Body>
void for_heads_and_rows(const RowProblem& p, std::int64_t begin, std::int64_t end, Body&& body) {
  if (p.x.stride[1] < p.x.stride[2]) {
    for (std::int64_t l = begin; l < end; ++l) {
      for (std::int64_t h = 0; h < p.heads; ++h) body(h, l);
    }
  } else {
    for (std::int64_t h = 0; h < p.heads; ++h) {
      for (std::int64_t l = begin; l < end; ++l) body(h, l);
    }
  }
}

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The work of one task: samples [b, b_end), rows [l, l_end).
struct Block {
  std::int64_t b, b_end, l, l_end;
};

// Cuts batch * length into blocks of at most `rows` rows and `samples` samples and runs them.
template <typename Body>
void for_blocks(const Parallel& parallel, std::int64_t batch, std::int64_t length,
                std::int64_t samples, std::int64_t rows, Body&& body) {
  const std::int64_t row_blocks = divide_up(length, rows);
  parallel.run(divide_up(batch, samples) * row_blocks, [&](std::int64_t index, int) {
    const std::int64_t b = index / row_blocks * samples;
    const std::int64_t l = index % row_blocks * rows;
    body(Block{b, std::min(b + samples, batch), l, std::min(l + rows, length)});
  });
}

// Blocks of one sample, or of several whole ones if they are small.
template <typename Body>
void for_blocks(const Parallel& parallel, const RowProblem& p, Body&& body) {
  const std::int64_t row = std::max<std::int64_t>(1, p.heads * p.dim);
  const std::int64_t rows = std::clamp<std::int64_t>(kTaskElements / row, 1, p.length);
  const std::int64_t samples =
      rows < p.length ? 1 : std::max<std::int64_t>(1, kTaskElements / (row * p.length));
  for_blocks(parallel, p.batch, p.length, samples, rows, body);
}

bool is_empty(const RowProblem& p) {
  return p.batch == 0 || p.heads == 0 || p.length == 0 || p.dim == 0;
}

// ---- Sines and cosines
// ----------------------------------------------------------------------------

template <typename T>
void sinusoid_table(const SinusoidTable& p, const Parallel& parallel) {
  using C = compute_t<T>;
  if (p.length == 0 || p.sines == 0) return;
  const std::shared_ptr<const Sinusoids> sinusoids = Sinusoids::make(p.frequencies, p.sines);
  // A multiple of 32 rows, so that few blocks share a first factor.
  const std::int64_t rows =
      Sinusoids::kRows * std::max<std::int64_t>(1, kTaskElements / (64 * p.sines));
  for_blocks(parallel, 1, p.length, 1, rows, [&](const Block& block) {
    SinusoidCursor cursor(*sinusoids);
    for (std::int64_t l = block.l; l < block.l_end; ++l) {
      cursor.move_to(p.offset + l);
      T* sine = static_cast<T*>(p.sine) + l * p.row_stride;
      T* cosine = static_cast<T*>(p.cosine) + l * p.row_stride;
      for (std::int64_t i = 0; i < p.sines; ++i) {
        sine[i * p.pair_stride] = static_cast<T>(static_cast<C>(cursor.sine()[i]));
      }
      for (std::int64_t i = 0; i < p.cosines; ++i) {
        cosine[i * p.pair_stride] = static_cast<T>(static_cast<C>(cursor.cosine()[i]));
      }
    }
  });
}

// row[2i] = scale * sine[i], row[2i + 1] = scale * cosine[i]
template <typename C>
void interleave(const double* sine, const double* cosine, double scale, C* __restrict row,
                std::int64_t dim) {
  const std::int64_t pairs = dim / 2;
  for (std::int64_t i = 0; i < pairs; ++i) {
    row[2 * i] = static_cast<C>(scale * sine[i]);
    row[2 * i + 1] = static_cast<C>(scale * cosine[i]);
  }
  if (dim % 2 == 1) row[dim - 1] = static_cast<C>(scale * sine[pairs]);
}

// ---- Additive encodings -------------------------------------------------------------------------

// out = x + encoding for one row of x.
template <typename T, typename C>
void add_row(const RowProblem& p, std::int64_t b, std::int64_t h, std::int64_t l, const C* encoding,
             C* scratch) {
  const std::int64_t out_stride = p.out.stride[3];
  T* out = row_of<T>(p.out, b, h, l);
  const C* x = read_row<C>(row_of<T>(p.x, b, h, l), p.x.stride[3], p.dim, scratch);
  C* __restrict sum = target_row<C>(out, out_stride, scratch + p.dim);
  for (std::int64_t i = 0; i < p.dim; ++i) sum[i] = x[i] + encoding[i];
  write_row<C>(sum, out, out_stride, p.dim);
}

template <typename T>
void add_sinusoid(const AddSinusoid& a, const Parallel& parallel) {
  using C = compute_t<T>;
  const RowProblem& p = a.rows;
  if (is_empty(p)) return;
  const bool per_sample = p.positions.per_sample();
  const std::shared_ptr<const Sinusoids> sinusoids =
      Sinusoids::make({p.dim, a.base, 1.0}, (p.dim + 1) / 2);
  const CoarseRows coarse_rows(*sinusoids, p, parallel);
  // A block of encodings is made once and added to the samples of the task while it is in the
  // second-level cache.
  const std::int64_t block_rows = Sinusoids::kRows;
  const std::int64_t samples =
      std::max<std::int64_t>(1, 4 * kTaskElements / (block_rows * p.heads * p.dim));
  const std::int64_t cached_rows = std::clamp<std::int64_t>(kTaskElements / p.dim, 1, block_rows);
  for_blocks(parallel, p.batch, p.length, samples, block_rows, [&](const Block& block) {
    SinusoidCursor cursor(*sinusoids, &coarse_rows);
    std::vector<C> encoding(cached_rows * p.dim);
    std::vector<C> scratch(2 * p.dim);
    for (std::int64_t begin = block.l; begin < block.l_end; begin += cached_rows) {
      const std::int64_t end = std::min(begin + cached_rows, block.l_end);
      for (std::int64_t b = block.b; b < block.b_end; ++b) {
        if (b == block.b || per_sample) {
          for (std::int64_t l = begin; l < end; ++l) {
            cursor.move_to(p.positions.at(b, l));
            interleave(cursor.sine(), cursor.cosine(), a.scale,
                       encoding.data() + (l - begin) * p.dim, p.dim);
          }
        }
        for_heads_and_rows(p, begin, end, [&](std::int64_t h, std::int64_t l) {
          add_row<T>(p, b, h, l, encoding.data() + (l - begin) * p.dim, scratch.data());
        });
      }
    }
  });
}

template <typename T, typename Table>
void add_learned(const AddLearned& a, const Parallel& parallel) {
  using C = compute_t<T>;
  const RowProblem& p = a.rows;
  if (is_empty(p)) return;
  for_blocks(parallel, p, [&](const Block& block) {
    std::vector<C> scratch(3 * p.dim);
    for (std::int64_t b = block.b; b < block.b_end; ++b) {
      for_heads_and_rows(p, block.l, block.l_end, [&](std::int64_t h, std::int64_t l) {
        const Table* row =
            static_cast<const Table*>(a.table) + p.positions.at(b, l) * a.table_stride[0];
        const C* encoding = read_row<C>(row, a.table_stride[1], p.dim, scratch.data() + 2 * p.dim);
        add_row<T>(p, b, h, l, encoding, scratch.data());
      });
    }
  });
}

template <typename T, typename Table>
void learned_table_grad(const LearnedTableGrad& p, const Parallel& parallel) {
  using C = compute_t<T>;
  if (p.table_rows == 0 || p.dim == 0) return;
  // Columns are cut as well: with padding one row of the table may own most of the sum.
  const std::int64_t columns = std::min<std::int64_t>(p.dim, 256);
  const std::int64_t column_blocks = divide_up(p.dim, columns);
  const std::int64_t work = p.batch * p.heads * p.length * columns;  // of a column block
  const std::int64_t row_blocks =
      std::clamp<std::int64_t>(divide_up(work, kTaskElements), 1, p.table_rows);
  const std::int64_t rows = divide_up(p.table_rows, row_blocks);

  parallel.run(row_blocks * column_blocks, [&](std::int64_t index, int) {
    const std::int64_t column = index % column_blocks * columns;
    const std::int64_t n = std::min(columns, p.dim - column);
    const std::int64_t first_row = index / column_blocks * rows;
    const std::int64_t end_row = std::min(first_row + rows, p.table_rows);
    std::vector<C> sum(n);
    std::vector<C> scratch(n);

    // Adds what row l of the samples [b, b_end) gives.
    const auto accumulate = [&](std::int64_t b, std::int64_t b_end, std::int64_t l) {
      for (; b < b_end; ++b) {
        for (std::int64_t h = 0; h < p.heads; ++h) {
          const T* row = row_of<T>(p.grad, b, h, l) + column * p.grad.stride[3];
          const C* grad = read_row<C>(row, p.grad.stride[3], n, scratch.data());
          for (std::int64_t i = 0; i < n; ++i) sum[i] += grad[i];
        }
      }
    };
    for (std::int64_t row = first_row; row < end_row; ++row) {
      const std::int64_t id = row - p.offset;
      std::fill(sum.begin(), sum.end(), C(0));
      if (p.sorted_ids == nullptr) {
        if (id >= 0 && id < p.length) accumulate(0, p.batch, id);
      } else {
        const auto [begin, end] = std::equal_range(p.sorted_ids, p.sorted_ids + p.entries, id);
        for (const std::int64_t* e = begin; e < end; ++e) {
          const std::int64_t entry = p.order[e - p.sorted_ids];
          if (p.per_sample) {
            accumulate(entry / p.length, entry / p.length + 1, entry % p.length);
          } else {
            accumulate(0, p.batch, entry);
          }
        }
      }
      Table* out = static_cast<Table*>(p.grad_table) + row * p.dim + column;
      for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<Table>(sum[i]);
    }
  });
}

// ---- Rotary -------------------------------------------------------------------------------------

template <typename C>
void rotate_halves(const C* x, const C* cosine, const C* sine, C sign, C* __restrict y,
                   std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    y[i] = x[i] * cosine[i] - sign * x[i + pairs] * sine[i];
  }
  for (std::int64_t i = 0; i < pairs; ++i) {
    y[i + pairs] = x[i + pairs] * cosine[i] + sign * x[i] * sine[i];
  }
}

template <typename C>
void rotate_interleaved(const C* x, const C* cosine, const C* sine, C sign, C* __restrict y,
                        std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    const C a = x[2 * i];
    const C b = x[2 * i + 1];
    const C s = sign * sine[i];
    y[2 * i] = a * cosine[i] - b * s;
    y[2 * i + 1] = b * cosine[i] + a * s;
  }
}

template <typename T>
void rotary(const Rotary& r, const Parallel& parallel) {
  using C = compute_t<T>;
  const RowProblem& p = r.rows;
  if (is_empty(p)) return;
  const C sign = r.conjugate ? C(-1) : C(1);
  const std::int64_t rotated = 2 * r.pairs;
  for_blocks(parallel, p, [&](const Block& block) {
    std::vector<C> scratch(2 * p.dim + 2 * r.pairs);
    C* x_scratch = scratch.data();
    C* y_scratch = x_scratch + p.dim;
    C* cosine_scratch = y_scratch + p.dim;
    C* sine_scratch = cosine_scratch + r.pairs;
    for (std::int64_t b = block.b; b < block.b_end; ++b) {
      const C* cosines = static_cast<const C*>(r.cosine) + b * r.cosine_stride[0];
      const C* sines = static_cast<const C*>(r.sine) + b * r.sine_stride[0];
      for_heads_and_rows(p, block.l, block.l_end, [&](std::int64_t h, std::int64_t l) {
        const std::int64_t position = p.positions.at(b, l);
        const C* cosine = read_row<C>(cosines + position * r.cosine_stride[1], r.cosine_stride[2],
                                      r.pairs, cosine_scratch);
        const C* sine = read_row<C>(sines + position * r.sine_stride[1], r.sine_stride[2], r.pairs,
                                    sine_scratch);
        T* out = row_of<T>(p.out, b, h, l);
        const C* x = read_row<C>(row_of<T>(p.x, b, h, l), p.x.stride[3], p.dim, x_scratch);
        C* y = target_row<C>(out, p.out.stride[3], y_scratch);
        if (r.interleaved) {
          rotate_interleaved(x, cosine, sine, sign, y, r.pairs);
        } else {
          rotate_halves(x, cosine, sine, sign, y, r.pairs);
        }
        std::copy(x + rotated, x + p.dim, y + rotated);
        write_row<C>(y, out, p.out.stride[3], p.dim);
      });
    }
  });
}

// ---- The types
// -----------------------------------------------------------------------------------

void any_sinusoid_table(const SinusoidTable& p, const Parallel& parallel) {
  with_type(p.dtype, [&]<typename T>(T) { sinusoid_table<T>(p, parallel); });
}

void any_add_sinusoid(const AddSinusoid& p, const Parallel& parallel) {
  with_type(p.rows.dtype, [&]<typename T>(T) { add_sinusoid<T>(p, parallel); });
}

void any_add_learned(const AddLearned& p, const Parallel& parallel) {
  with_type(p.rows.dtype, [&]<typename T>(T) {
    if (p.table_dtype == p.rows.dtype) return add_learned<T, T>(p, parallel);
    if constexpr (sizeof(T) == 2) add_learned<T, float>(p, parallel);
  });
}

void any_learned_table_grad(const LearnedTableGrad& p, const Parallel& parallel) {
  with_type(p.dtype, [&]<typename T>(T) {
    if (p.table_dtype == p.dtype) return learned_table_grad<T, T>(p, parallel);
    if constexpr (sizeof(T) == 2) learned_table_grad<T, float>(p, parallel);
  });
}

void any_rotary(const Rotary& p, const Parallel& parallel) {
  with_type(p.rows.dtype, [&]<typename T>(T) { rotary<T>(p, parallel); });
}

}  // namespace

extern const PositionalKernels positional;
const PositionalKernels positional = {any_sinusoid_table, any_add_sinusoid, any_add_learned,
                                      any_learned_table_grad, any_rotary};

}  // namespace torch_selfattn::kernels::cpu::TSA_INSTRUCTION_SET
