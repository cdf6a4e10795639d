#pragma once

#include <cstdint>
#include <utility>

#if defined(__x86_64__)
// GCC 12 takes its own "undefined" vectors for uninitialised ones.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// Vectors of the widest registers that the file is compiled for. One source serves every
// instruction set: attention_<isa>.cpp defines TSA_CPU_ISA, the namespace that keeps its copy of
// this code apart, and includes the same headers. Arithmetic is the compiler's own (+ - * / and
// comparisons on vector types); functions here are what that does not express or does badly.
//
// Nothing here may call an inline function of the standard library or of kernels/common that the
// compiler could leave out of line: the linker keeps one copy for the whole program, and that copy
// could be the one with AVX-512 instructions.
#ifndef TSA_CPU_ISA
#error "define TSA_CPU_ISA before including the CPU kernels"
#endif

#define TSA_INLINE inline __attribute__((always_inline))

namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  typedef float vector __attribute__((vector_size(kVectorBytes)));
  typedef std::int32_t integers __attribute__((vector_size(kVectorBytes)));
  typedef std::uint32_t words __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorTypes<double> {
  typedef double vector __attribute__((vector_size(kVectorBytes)));
  typedef std::int64_t integers __attribute__((vector_size(kVectorBytes)));
  typedef std::uint64_t words __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};

template <typename T>
using Vec = typename VectorTypes<T>::vector;
template <typename T>
using IntVec = typename VectorTypes<T>::integers;  // also the result of a comparison: 0 or -1
template <typename T>
using WordVec = typename VectorTypes<T>::words;  // whose sums may wrap
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

using VecF = Vec<float>;
using VecD = Vec<double>;

template <typename T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

template <typename T>
TSA_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorTypes<T>::unaligned*>(from);
}
template <typename T>
TSA_INLINE void store(T* to, Vec<T> v) {
  *reinterpret_cast<typename VectorTypes<T>::unaligned*>(to) = v;
}
template <typename T>
TSA_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x, also for -0, so the compiler sees a broadcast
}

template <typename T, int... lane>
TSA_INLINE Vec<T> lane_numbers(std::integer_sequence<int, lane...>) {
  return Vec<T>{static_cast<T>(lane)...};
}
// {0, 1, 2, ...}
template <typename T>
TSA_INLINE Vec<T> lane_numbers() {
  return lane_numbers<T>(std::make_integer_sequence<int, kLanes<T>>{});
}

// The first n lanes of v, the others `other`.
template <typename T>
TSA_INLINE Vec<T> first_lanes(Vec<T> v, std::int64_t n, Vec<T> other) {
  return lane_numbers<T>() < splat<T>(static_cast<T>(n)) ? v : other;
}

// The first n < lanes elements, zeros behind them; touches nothing behind from[n - 1].
template <typename T>
TSA_INLINE Vec<T> load_first(const T* from, std::int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), from);
  } else {
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1u), from);
  }
#elif defined(__AVX2__)
  const auto mask = (__m256i)(lane_numbers<T>() < splat<T>(static_cast<T>(n)));
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_maskload_ps(from, mask);
  } else {
    return (Vec<T>)_mm256_maskload_pd(from, mask);
  }
#else
  Vec<T> v{};
  for (int lane = 0; lane < kLanes<T>; ++lane) v[lane] = lane < n ? from[lane] : T(0);
  return v;
#endif
}
template <typename T>
TSA_INLINE void store_first(T* to, Vec<T> v, std::int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1u), (__m512d)v);
  }
#elif defined(__AVX2__)
  const auto mask = (__m256i)(lane_numbers<T>() < splat<T>(static_cast<T>(n)));
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(to, mask, (__m256)v);
  } else {
    _mm256_maskstore_pd(to, mask, (__m256d)v);
  }
#else
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (lane < n) to[lane] = v[lane];
  }
#endif
}

// The first n elements, all if n >= lanes.
template <typename T>
inline Vec<T> load_up_to(const T* from, std::int64_t n) {
  return n >= kLanes<T> ? load(from) : load_first(from, n);
}
template <typename T>
inline void store_up_to(T* to, Vec<T> v, std::int64_t n) {
  if (n >= kLanes<T>) {
    store(to, v);
  } else {
    store_first(to, v, n);
  }
}

// Lanes whose byte is not 0: -1.
template <typename T>
TSA_INLINE IntVec<T> nonzero_bytes(const std::uint8_t* bytes) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (IntVec<T>)_mm512_cvtepu8_epi32(
               _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))) != 0;
  } else {
    return (IntVec<T>)_mm512_cvtepu8_epi64(
               _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))) != 0;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (IntVec<T>)_mm256_cvtepu8_epi32(
               _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))) != 0;
  } else {
    std::int32_t four;
    __builtin_memcpy(&four, bytes, sizeof(four));
    return (IntVec<T>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)) != 0;
  }
#else
  IntVec<T> v{};
  for (int lane = 0; lane < kLanes<T>; ++lane) v[lane] = bytes[lane] != 0 ? -1 : 0;
  return v;
#endif
}

// Whether a lane of a comparison holds.
template <typename T>
TSA_INLINE bool any_lane(IntVec<T> v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)v, (__m256i)v) == 0;
#else
  bool any = false;
  for (int lane = 0; lane < kLanes<T>; ++lane) any = any || v[lane] != 0;
  return any;
#endif
}

// a * b + c and c - a * b, fused where the machine can.
#if defined(__AVX512F__)
TSA_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a, b, c); }
TSA_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm512_fmadd_pd(a, b, c); }
TSA_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm512_fnmadd_ps(a, b, c); }
TSA_INLINE VecD fnma(VecD a, VecD b, VecD c) { return _mm512_fnmadd_pd(a, b, c); }
#elif defined(__FMA__)
TSA_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a, b, c); }
TSA_INLINE VecD fma(VecD a, VecD b, VecD c) { return _mm256_fmadd_pd(a, b, c); }
TSA_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm256_fnmadd_ps(a, b, c); }
TSA_INLINE VecD fnma(VecD a, VecD b, VecD c) { return _mm256_fnmadd_pd(a, b, c); }
#else
TSA_INLINE VecF fma(VecF a, VecF b, VecF c) { return a * b + c; }
TSA_INLINE VecD fma(VecD a, VecD b, VecD c) { return a * b + c; }
TSA_INLINE VecF fnma(VecF a, VecF b, VecF c) { return c - a * b; }
TSA_INLINE VecD fnma(VecD a, VecD b, VecD c) { return c - a * b; }
#endif

// limit(bound, v): where v is NaN the result is NaN, because the instructions return their second
// operand then. The order of the arguments matters.
#if defined(__AVX512F__)
TSA_INLINE VecF at_least(VecF bound, VecF v) { return _mm512_max_ps(bound, v); }
TSA_INLINE VecD at_least(VecD bound, VecD v) { return _mm512_max_pd(bound, v); }
TSA_INLINE VecF at_most(VecF bound, VecF v) { return _mm512_min_ps(bound, v); }
TSA_INLINE VecD at_most(VecD bound, VecD v) { return _mm512_min_pd(bound, v); }
#elif defined(__AVX2__)
TSA_INLINE VecF at_least(VecF bound, VecF v) { return _mm256_max_ps(bound, v); }
TSA_INLINE VecD at_least(VecD bound, VecD v) { return _mm256_max_pd(bound, v); }
TSA_INLINE VecF at_most(VecF bound, VecF v) { return _mm256_min_ps(bound, v); }
TSA_INLINE VecD at_most(VecD bound, VecD v) { return _mm256_min_pd(bound, v); }
#elif defined(__SSE2__)
TSA_INLINE VecF at_least(VecF bound, VecF v) { return _mm_max_ps(bound, v); }
TSA_INLINE VecD at_least(VecD bound, VecD v) { return _mm_max_pd(bound, v); }
TSA_INLINE VecF at_most(VecF bound, VecF v) { return _mm_min_ps(bound, v); }
TSA_INLINE VecD at_most(VecD bound, VecD v) { return _mm_min_pd(bound, v); }
#else
TSA_INLINE VecF at_least(VecF bound, VecF v) { return bound > v ? bound : v; }
TSA_INLINE VecD at_least(VecD bound, VecD v) { return bound > v ? bound : v; }
TSA_INLINE VecF at_most(VecF bound, VecF v) { return bound < v ? bound : v; }
TSA_INLINE VecD at_most(VecD bound, VecD v) { return bound < v ? bound : v; }
#endif

TSA_INLINE VecF absolute(VecF v) { return (VecF)((IntVec<float>)v & 0x7fffffff); }
TSA_INLINE VecD absolute(VecD v) { return (VecD)((IntVec<double>)v & 0x7fffffffffffffff); }

// Reductions over lanes by halves, so that the order does not depend on the compiler.
template <typename T>
TSA_INLINE T sum_lanes(Vec<T> v) {
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    Vec<T> shifted = v;
    for (int lane = 0; lane < width; ++lane) shifted[lane] = v[lane + width];
    v += shifted;
  }
  return v[0];
}
template <typename T>
TSA_INLINE T max_lanes(Vec<T> v) {
  T result = v[0];
  for (int lane = 1; lane < kLanes<T>; ++lane) result = v[lane] > result ? v[lane] : result;
  return result;
}
#if defined(__AVX512F__)
template <>
TSA_INLINE float sum_lanes<float>(VecF v) {
  return _mm512_reduce_add_ps(v);
}
template <>
TSA_INLINE float max_lanes<float>(VecF v) {
  return _mm512_reduce_max_ps(v);
}
template <>
TSA_INLINE double sum_lanes<double>(VecD v) {
  return _mm512_reduce_add_pd(v);
}
template <>
TSA_INLINE double max_lanes<double>(VecD v) {
  return _mm512_reduce_max_pd(v);
}
#elif defined(__AVX2__)
template <>
TSA_INLINE float sum_lanes<float>(VecF v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
template <>
TSA_INLINE float max_lanes<float>(VecF v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#endif

// a0 b0 a1 b1 ... of the lower and of the upper halves of two vectors.
template <typename V, int... lane>
TSA_INLINE void interleave(V& a, V& b, std::integer_sequence<int, lane...>) {
  constexpr int n = sizeof...(lane);
  const V low = __builtin_shufflevector(a, b, (lane / 2 + (lane % 2) * n)...);
  const V high = __builtin_shufflevector(a, b, (n / 2 + lane / 2 + (lane % 2) * n)...);
  a = low;
  b = high;
}

// Transposes a square of lanes x lanes: log2(lanes) perfect shuffles of the rows.
template <typename T>
TSA_INLINE void transpose(Vec<T> (&row)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    Vec<T> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = row[i];
      next[2 * i + 1] = row[i + n / 2];
      interleave(next[2 * i], next[2 * i + 1], std::make_integer_sequence<int, n>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) row[i] = next[i];
  }
}

// Lane l: all lanes of v[l], joined in pairs by join(a, b). Half the shuffles of transpose().
template <typename T, typename Join>
TSA_INLINE Vec<T> joined_lanes(Vec<T> (&v)[kLanes<T>], const Join& join) {
#pragma GCC unroll 4
  for (int n = kLanes<T> / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      interleave(v[i], v[i + n], std::make_integer_sequence<int, kLanes<T>>{});
      v[i] = join(v[i], v[i + n]);
    }
  }
  return v[0];
}
template <typename T>
TSA_INLINE Vec<T> sums_of_lanes(Vec<T> (&v)[kLanes<T>]) {
  return joined_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <typename T>
TSA_INLINE Vec<T> maxima_of_lanes(Vec<T> (&v)[kLanes<T>]) {
  return joined_lanes<T>(v, [](Vec<T> a, Vec<T> b) { return at_least(a, b); });
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
