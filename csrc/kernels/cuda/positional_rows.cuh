#pragma once

// What the kernels of positional.cu do to a row.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/common/positional_problem.h"
#include "kernels/common/sincos_turns.h"
#include "kernels/cuda/device_assert.h"
#include "kernels/cuda/launch.h"

namespace torch_selfattn::kernels::cuda {

namespace {

template <typename T>
using compute_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T narrow(compute_t<T> x) {
  if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

__device__ __forceinline__ void sincos_turns(double turns, double* sine, double* cosine) {
  sincospi(2.0 * (turns - rint(turns)), sine, cosine);
}
using kernels::sincos_turns;

// Turns per position of pair i.
struct TurnFrequencies {
  double log2_base;
  double exponent_step;  // 2 / dim
  double scale;          // 1 / (2 pi scaling)

  explicit TurnFrequencies(const Frequencies& f)
      : log2_base(std::log2(f.base)),
        exponent_step(2.0 / static_cast<double>(std::max<std::int64_t>(1, f.dim))),
        scale(0.15915494309189535 / f.scaling) {}
  __device__ double of(std::int64_t pair) const {
    return scale * exp2(-log2_base * (exponent_step * static_cast<double>(pair)));
  }
};

// ---- Columns of a row ---------------------------------------------------------------------------

template <typename T, int n>
struct alignas(sizeof(T) * n) Pack {
  T value[n];
};

// n columns from `column` on. packed: contiguous, aligned and all inside the row.
template <bool packed, int n, typename T, typename C>
__device__ __forceinline__ void load(const T* row, std::int64_t stride, std::int64_t column,
                                     std::int64_t dim, C (&x)[n]) {
  if constexpr (packed) {
    const auto pack = *reinterpret_cast<const Pack<T, n>*>(row + column);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = widen(pack.value[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = column + i < dim ? C(widen(row[(column + i) * stride])) : C(0);
    }
  }
}

template <bool packed, int n, typename T>
__device__ __forceinline__ void store(T* row, std::int64_t stride, std::int64_t column,
                                      std::int64_t dim, const compute_t<T> (&y)[n]) {
  if constexpr (packed) {
    Pack<T, n> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) pack.value[i] = narrow<T>(y[i]);
    *reinterpret_cast<Pack<T, n>*>(row + column) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (column + i < dim) row[(column + i) * stride] = narrow<T>(y[i]);
    }
  }
}

template <typename T>
__device__ __forceinline__ const T* row_of(const ConstView& v, std::int64_t b, std::int64_t h,
                                           std::int64_t l) {
  return static_cast<const T*>(v.data) + b * v.stride[0] + h * v.stride[1] + l * v.stride[2];
}
template <typename T>
__device__ __forceinline__ T* row_of(const View& v, std::int64_t b, std::int64_t h,
                                     std::int64_t l) {
  return static_cast<T*>(v.data) + b * v.stride[0] + h * v.stride[1] + l * v.stride[2];
}

// ---- What is done to a row
// ------------------------------------------------------------------------ begin(unit) once per
// thread, move_to(b, l) once per position, apply(b, h, l) per row.

template <typename T, int n, bool packed>
struct AddSinusoidRow {
  using C = compute_t<T>;
  RowProblem rows;
  TurnFrequencies frequencies;
  double scale;

  struct State {
    std::int64_t column;
    double frequency[n / 2];
    C encoding[n];
  };
  __device__ void begin(std::int64_t unit, State& s) const {
    s.column = unit * n;
#pragma unroll
    for (int i = 0; i < n / 2; ++i) s.frequency[i] = frequencies.of(unit * (n / 2) + i);
  }
  __device__ void move_to(std::int64_t b, std::int64_t l, State& s) const {
    const double position = static_cast<double>(rows.positions.at(b, l));
#pragma unroll
    for (int i = 0; i < n / 2; ++i) {
      C sine, cosine;
      sincos_turns(position * s.frequency[i], &sine, &cosine);
      s.encoding[2 * i] = static_cast<C>(scale * static_cast<double>(sine));
      s.encoding[2 * i + 1] = static_cast<C>(scale * static_cast<double>(cosine));
    }
  }
  __device__ void apply(std::int64_t b, std::int64_t h, std::int64_t l, const State& s) const {
    C x[n];
    load<packed>(row_of<T>(rows.x, b, h, l), rows.x.stride[3], s.column, rows.dim, x);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += s.encoding[i];
    store<packed>(row_of<T>(rows.out, b, h, l), rows.out.stride[3], s.column, rows.dim, x);
  }
};

template <typename T, typename Table, int n, bool packed>
struct AddLearnedRow {
  using C = compute_t<T>;
  RowProblem rows;
  const Table* table;
  std::int64_t table_rows;
  std::int64_t table_stride[2];

  struct State {
    std::int64_t column;
    C encoding[n];
  };
  __device__ void begin(std::int64_t unit, State& s) const { s.column = unit * n; }
  __device__ void move_to(std::int64_t b, std::int64_t l, State& s) const {
    const std::int64_t position = rows.positions.at(b, l);
    device_assert(position >= 0 && position < table_rows,
                  "add_learned_encoding: positions must lie in the table");
    load<packed>(table + position * table_stride[0], table_stride[1], s.column, rows.dim,
                 s.encoding);
  }
  __device__ void apply(std::int64_t b, std::int64_t h, std::int64_t l, const State& s) const {
    C x[n];
    load<packed>(row_of<T>(rows.x, b, h, l), rows.x.stride[3], s.column, rows.dim, x);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] += s.encoding[i];
    store<packed>(row_of<T>(rows.out, b, h, l), rows.out.stride[3], s.column, rows.dim, x);
  }
};

// n pairs. Interleaved: 2n columns from 2n * unit on; halves: n columns of each. Units behind the
// rotated columns copy as many columns.
template <typename T, int n, bool packed, bool interleaved>
struct RotaryRow {
  using C = compute_t<T>;
  Rotary r;

  struct State {
    std::int64_t first;   // column of the first element of the first pair
    std::int64_t second;  // halves: column of its second element
    bool rotates;
    C cosine[n];
    C sine[n];
  };

  static std::int64_t units(const Rotary& r) {
    const std::int64_t rest = r.rows.dim - 2 * r.pairs;
    return (r.pairs + n - 1) / n + (rest + 2 * n - 1) / (2 * n);
  }
  __device__ void begin(std::int64_t unit, State& s) const {
    const std::int64_t rotating_units = (r.pairs + n - 1) / n;
    s.rotates = unit < rotating_units;
    s.first = interleaved ? 2 * n * unit : n * unit;
    s.second = s.first + (interleaved ? 1 : r.pairs);
    if (!s.rotates) {
      s.first = 2 * r.pairs + (unit - rotating_units) * 2 * n;
      s.second = s.first + n;
    }
  }
  __device__ void move_to(std::int64_t b, std::int64_t l, State& s) const {
    if (!s.rotates) return;
    const std::int64_t position = r.rows.positions.at(b, l);
    device_assert(position >= 0 && position < r.table_rows,
                  "rotary_embedding: position_ids must lie in the table");
    const C* cosine =
        static_cast<const C*>(r.cosine) + b * r.cosine_stride[0] + position * r.cosine_stride[1];
    const C* sine =
        static_cast<const C*>(r.sine) + b * r.sine_stride[0] + position * r.sine_stride[1];
    const std::int64_t pair = interleaved ? s.first / 2 : s.first;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (!packed && pair + i >= r.pairs) continue;
      s.cosine[i] = cosine[(pair + i) * r.cosine_stride[2]];
      s.sine[i] = sine[(pair + i) * r.sine_stride[2]];
      if (r.conjugate) s.sine[i] = -s.sine[i];
    }
  }
  __device__ void apply(std::int64_t b, std::int64_t h, std::int64_t l, const State& s) const {
    const T* x = row_of<T>(r.rows.x, b, h, l);
    T* out = row_of<T>(r.rows.out, b, h, l);
    const std::int64_t x_stride = r.rows.x.stride[3];
    const std::int64_t out_stride = r.rows.out.stride[3];
    if constexpr (interleaved) {
      C v[2 * n];
      load<packed>(x, x_stride, s.first, r.rows.dim, v);
      if (s.rotates) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const C a = v[2 * i];
          const C c = v[2 * i + 1];
          v[2 * i] = a * s.cosine[i] - c * s.sine[i];
          v[2 * i + 1] = c * s.cosine[i] + a * s.sine[i];
        }
      }
      store<packed>(out, out_stride, s.first, r.rows.dim, v);
    } else {
      C v[n];
      C w[n];
      load<packed>(x, x_stride, s.first, r.rows.dim, v);
      load<packed>(x, x_stride, s.second, r.rows.dim, w);
      if (s.rotates) {
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const C a = v[i];
          const C c = w[i];
          v[i] = a * s.cosine[i] - c * s.sine[i];
          w[i] = c * s.cosine[i] + a * s.sine[i];
        }
      }
      store<packed>(out, out_stride, s.first, r.rows.dim, v);
      store<packed>(out, out_stride, s.second, r.rows.dim, w);
    }
  }
};

}  // namespace

}  // namespace torch_selfattn::kernels::cuda
