#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

#include "kernels/common/attention_problem.h"
#include "kernels/cpu/vector_math.h"

// Rows of tensors of any dtype and stride to and from the type that is computed in (T = float, or
// double for float64). The layouts that the matrix products read are in operand.h.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Keys side by side in a panel: two vectors, so that the inner loop of a product loads two vectors
// of keys and broadcasts one number per query.
template <typename T>
constexpr int kPanel = 2 * kLanes<T>;

TSA_INLINE float widen_bfloat16(std::uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
}
TSA_INLINE std::uint16_t narrow_bfloat16(float value) {
  const auto u = __builtin_bit_cast(std::uint32_t, value);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
TSA_INLINE float widen_float16(std::uint16_t bits) {
  // The exponent is re-biased by a product, which is right for subnormal numbers as well.
  const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
  const auto scaled =
      __builtin_bit_cast(std::uint32_t, __builtin_bit_cast(float, magnitude) * 0x1p112f);
  const std::uint32_t finite_or_not =
      (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u | magnitude : scaled;
  return __builtin_bit_cast(float,
                            finite_or_not | (static_cast<std::uint32_t>(bits & 0x8000u) << 16));
}
TSA_INLINE std::uint16_t narrow_float16(float value) {
#if defined(__F16C__)
  return _cvtss_sh(value, 0);
#else
  return float16(value).bits;
#endif
}

// Whole vectors of 16-bit numbers.
TSA_INLINE VecF widen_bfloat16s(const std::uint16_t* from) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (VecF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (VecF)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  typedef std::uint16_t Bits __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  const auto bits = *reinterpret_cast<const Bits*>(from);
  return (VecF)(__builtin_convertvector(bits, IntVec<float>) << 16);
#endif
}
TSA_INLINE VecF widen_float16s(const std::uint16_t* from) {
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__F16C__)
  return (VecF)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  VecF v{};
  for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = widen_float16(from[lane]);
  return v;
#endif
}
// As narrow_bfloat16().
TSA_INLINE void narrow_bfloat16s(VecF v, std::uint16_t* to) {
#if defined(__AVX512BF16__)
  // But subnormal numbers become 0, as in the products of these processors.
  const auto narrowed = (__m256i)_mm512_cvtneps_pbh((__m512)v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed);
#else
  typedef std::uint16_t Bits __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  const auto bits = (WordVec<float>)v;
  const WordVec<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WordVec<float> nan = WordVec<float>{} + 0x7fc0u;
  *reinterpret_cast<Bits*>(to) = __builtin_convertvector(v == v ? rounded : nan, Bits);
#endif
}
TSA_INLINE void narrow_float16s(VecF v, std::uint16_t* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)v, 0));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow_float16(v[lane]);
#endif
}

template <DType dtype>
struct Storage;
template <>
struct Storage<DType::kFloat64> {
  using type = double;
  static TSA_INLINE double widen(double x) { return x; }
  static TSA_INLINE double narrow(double x) { return x; }
};
template <>
struct Storage<DType::kFloat32> {
  using type = float;
  static TSA_INLINE float widen(float x) { return x; }
  static TSA_INLINE float narrow(float x) { return x; }
};
template <>
struct Storage<DType::kFloat16> {
  using type = std::uint16_t;
  static TSA_INLINE float widen(std::uint16_t x) { return widen_float16(x); }
  static TSA_INLINE std::uint16_t narrow(float x) { return narrow_float16(x); }
};
template <>
struct Storage<DType::kBFloat16> {
  using type = std::uint16_t;
  static TSA_INLINE float widen(std::uint16_t x) { return widen_bfloat16(x); }
  static TSA_INLINE std::uint16_t narrow(float x) { return narrow_bfloat16(x); }
};

template <typename T, DType dtype>
inline void load_elements(const void* data, std::int64_t offset, std::int64_t stride,
                          std::int64_t n, T* to) {
  const auto* from = static_cast<const typename Storage<dtype>::type*>(data) + offset;
  if (stride == 1) {
    std::int64_t d = 0;
    if constexpr (dtype == DType::kFloat16 && sizeof(T) == 4) {
      for (; d + kLanes<T> <= n; d += kLanes<T>) store(to + d, widen_float16s(from + d));
    }
    for (; d < n; ++d) to[d] = static_cast<T>(Storage<dtype>::widen(from[d]));
  } else {
    for (std::int64_t d = 0; d < n; ++d) {
      to[d] = static_cast<T>(Storage<dtype>::widen(from[d * stride]));
    }
  }
}
// kLanes<T> elements.
template <typename T, DType dtype>
TSA_INLINE void store_narrowed(typename Storage<dtype>::type* to, Vec<T> v) {
  if constexpr (sizeof(typename Storage<dtype>::type) == sizeof(T)) {
    store(to, v);
  } else if constexpr (dtype == DType::kBFloat16 && sizeof(T) == 4) {
    narrow_bfloat16s(v, to);
  } else if constexpr (dtype == DType::kFloat16 && sizeof(T) == 4) {
    narrow_float16s(v, to);
  } else {
    using Wide = decltype(Storage<dtype>::widen({}));
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      to[lane] = Storage<dtype>::narrow(static_cast<Wide>(v[lane]));
    }
  }
}
template <typename T, DType dtype>
inline void store_elements(void* data, std::int64_t offset, std::int64_t stride, std::int64_t n,
                           const T* from) {
  using Element = typename Storage<dtype>::type;
  auto* to = static_cast<Element*>(data) + offset;
  using Wide = decltype(Storage<dtype>::widen(Element{}));
  if (stride == 1) {
    std::int64_t d = 0;
    for (; d + kLanes<T> <= n; d += kLanes<T>) store_narrowed<T, dtype>(to + d, load(from + d));
    for (; d < n; ++d) to[d] = Storage<dtype>::narrow(static_cast<Wide>(from[d]));
  } else {
    for (std::int64_t d = 0; d < n; ++d) {
      to[d * stride] = Storage<dtype>::narrow(static_cast<Wide>(from[d]));
    }
  }
}

// kLanes<T> elements.
template <typename T, DType dtype>
TSA_INLINE Vec<T> load_widened(const typename Storage<dtype>::type* from) {
  if constexpr (sizeof(typename Storage<dtype>::type) == sizeof(T)) {
    return load(from);
  } else if constexpr (dtype == DType::kBFloat16) {
    return widen_bfloat16s(from);
  } else if constexpr (dtype == DType::kFloat16) {
    return widen_float16s(from);
  } else {
    Vec<T> v{};
    for (int lane = 0; lane < kLanes<T>; ++lane) v[lane] = static_cast<T>(from[lane]);
    return v;
  }
}
// The first n < kLanes of them, zeros behind; touches nothing behind from[n - 1].
template <typename T, DType dtype>
TSA_INLINE Vec<T> load_first_widened(const typename Storage<dtype>::type* from, std::int64_t n) {
  using Element = typename Storage<dtype>::type;
  if constexpr (sizeof(Element) == sizeof(T)) {
    return load_first(from, n);
  } else {
    Element elements[kLanes<T>] = {};
    for (std::int64_t d = 0; d < n; ++d) elements[d] = from[d];
    return load_widened<T, dtype>(elements);
  }
}
// body.template operator()<dtype>() for the dtypes that are computed with in T.
template <typename T, typename Body>
TSA_INLINE void with_widened(DType dtype, Body&& body) {
  if constexpr (sizeof(T) == 8) {
    if (dtype == DType::kFloat64) {
      body.template operator()<DType::kFloat64>();
    } else {
      body.template operator()<DType::kFloat32>();
    }
  } else {
    switch (dtype) {
      case DType::kFloat16: body.template operator()<DType::kFloat16>(); break;
      case DType::kBFloat16: body.template operator()<DType::kBFloat16>(); break;
      default: body.template operator()<DType::kFloat32>(); break;
    }
  }
}

// to[d] = data[offset + d * stride], widened. Out of line, as what follows from it: four dtypes by
// two loops, inlined into every unrolled step that may need one, take minutes to compile.
template <typename T>
[[gnu::noinline]] void load_row(DType dtype, const void* data, std::int64_t offset,
                                std::int64_t stride, std::int64_t n, T* to) {
  switch (dtype) {
    case DType::kFloat64: load_elements<T, DType::kFloat64>(data, offset, stride, n, to); break;
    case DType::kFloat32: load_elements<T, DType::kFloat32>(data, offset, stride, n, to); break;
    case DType::kFloat16: load_elements<T, DType::kFloat16>(data, offset, stride, n, to); break;
    case DType::kBFloat16: load_elements<T, DType::kBFloat16>(data, offset, stride, n, to); break;
  }
}
template <typename T>
inline T load_element(DType dtype, const void* data, std::int64_t index) {
  T element = 0;
  load_row(dtype, data, index, 1, 1, &element);
  return element;
}
template <typename T>
[[gnu::noinline]] void store_row(DType dtype, void* data, std::int64_t offset, std::int64_t stride,
                                 std::int64_t n, const T* from) {
  switch (dtype) {
    case DType::kFloat64: store_elements<T, DType::kFloat64>(data, offset, stride, n, from); break;
    case DType::kFloat32: store_elements<T, DType::kFloat32>(data, offset, stride, n, from); break;
    case DType::kFloat16: store_elements<T, DType::kFloat16>(data, offset, stride, n, from); break;
    case DType::kBFloat16:
      store_elements<T, DType::kBFloat16>(data, offset, stride, n, from);
      break;
  }
}

template <typename T, DType dtype>
inline Vec<T> store_scaled_elements(void* data, std::int64_t offset, std::int64_t stride,
                                    std::int64_t n, const T* from, T factor) {
  auto* const to = static_cast<typename Storage<dtype>::type*>(data) + offset;
  Vec<T> check{};
  for (std::int64_t d = 0; d < n; d += kLanes<T>) {
    const Vec<T> x = load(from + d) * splat(factor);
    check += x - x;
    if (stride == 1 && d + kLanes<T> <= n) {
      store_narrowed<T, dtype>(to + d, x);
    } else {
      T elements[kLanes<T>];
      store(elements, x);
      store_elements<T, dtype>(to, d * stride, stride, smaller<std::int64_t>(kLanes<T>, n - d),
                               elements);
    }
  }
  return check;
}
// For each of `rows` rows r, data[offset[r] + d * stride] = factor[r] * from[r * ld + d]; `from`
// has whole vectors. The result is NaN in some lane if a product is not finite, else 0.
template <typename T>
[[gnu::noinline]] Vec<T> store_scaled_rows(DType dtype, void* data, std::int64_t rows,
                                           const std::int64_t* offset, std::int64_t stride,
                                           std::int64_t n, const T* from, std::int64_t ld,
                                           const T* factor) {
  Vec<T> check{};
  const auto store_as = [&]<DType kType>() {
    for (std::int64_t r = 0; r < rows; ++r) {
      check +=
          store_scaled_elements<T, kType>(data, offset[r], stride, n, from + r * ld, factor[r]);
    }
  };
  switch (dtype) {
    case DType::kFloat64: store_as.template operator()<DType::kFloat64>(); break;
    case DType::kFloat32: store_as.template operator()<DType::kFloat32>(); break;
    case DType::kFloat16: store_as.template operator()<DType::kFloat16>(); break;
    case DType::kBFloat16: store_as.template operator()<DType::kBFloat16>(); break;
  }
  return check;
}
template <typename T>
inline Vec<T> store_scaled_row(DType dtype, void* data, std::int64_t offset, std::int64_t stride,
                               std::int64_t n, const T* from, T factor) {
  return store_scaled_rows<T>(dtype, data, 1, &offset, stride, n, from, 0, &factor);
}

// As size_of, which the compiler could leave out of line.
TSA_INLINE std::int64_t element_size(DType dtype) {
  if (dtype == DType::kFloat64) return 8;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// data[offset + d] = 0 for n elements.
inline void store_zeros(DType dtype, void* data, std::int64_t offset, std::int64_t n) {
  const std::int64_t size = element_size(dtype);
  if (n > 0) {
    __builtin_memset(static_cast<char*>(data) + offset * size, 0,
                     static_cast<std::size_t>(n * size));
  }
}

// One (b, h) of a tensor: rows of `width` elements.
struct Rows {
  DType dtype;
  const void* data;
  std::int64_t offset;  // of row 0
  std::int64_t row_stride;
  std::int64_t element_stride;
  std::int64_t width;

  std::int64_t at(std::int64_t row) const { return offset + row * row_stride; }
};
inline Rows rows_of(DType dtype, const ConstView& view, std::int64_t b, std::int64_t h,
                    std::int64_t width) {
  return {dtype,          view.data,      b * view.stride[0] + h * view.stride[1],
          view.stride[2], view.stride[3], width};
}

template <typename T>
inline void fill_zero(T* to, std::int64_t n) {
  if (n > 0) __builtin_memset(to, 0, static_cast<std::size_t>(n) * sizeof(T));
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
}

// Rows that the kernels can read where they are, or null. Whole vectors only: nothing behind a row
// may be read.
template <typename T>
inline const T* rows_in_place(const Rows& rows) {
  const bool usable =
      rows.dtype == dtype_of<T>() && rows.element_stride == 1 && rows.width % kLanes<T> == 0;
  return usable ? static_cast<const T*>(rows.data) + rows.offset : nullptr;
}

template <typename T>
inline std::int64_t padded(std::int64_t width) {
  return round_up(width, kLanes<T>);
}
// Of so many elements and more, such that a column of rows spreads over all sets of a cache: an odd
// number of lines.
template <typename T>
inline std::int64_t spread_rows(std::int64_t width) {
  constexpr std::int64_t line = 64 / static_cast<std::int64_t>(sizeof(T));
  return ((width + line - 1) / line | 1) * line;
}

template <typename T>
[[gnu::noinline]] Vec<T> gather_elements_of_row(const Rows& rows, std::int64_t row, std::int64_t d,
                                                std::int64_t n) {
  T widened[kLanes<T>] = {};
  load_row(rows.dtype, rows.data, rows.at(row) + d * rows.element_stride, rows.element_stride, n,
           widened);
  return load(widened);
}

// Elements [d, d + n) of a row, n <= lanes, zeros behind.
template <typename T>
TSA_INLINE Vec<T> load_elements_of_row(const Rows& rows, std::int64_t row, std::int64_t d,
                                       std::int64_t n) {
  if (rows.dtype == dtype_of<T>() && rows.element_stride == 1) {
    return load_up_to(static_cast<const T*>(rows.data) + rows.at(row) + d, n);
  }
  if constexpr (sizeof(T) == 4) {
    if (rows.element_stride == 1 && n == kLanes<T> && rows.dtype != DType::kFloat32) {
      const auto* const from = static_cast<const std::uint16_t*>(rows.data) + rows.at(row) + d;
      return rows.dtype == DType::kBFloat16 ? widen_bfloat16s(from) : widen_float16s(from);
    }
  }
  return gather_elements_of_row<T>(rows, row, d, n);
}

// What is done to a vector of elements d, d + 1, ... on its way into a panel, or of a product on
// its way out of the register tile.
template <typename T>
struct Scaled {
  Vec<T> factor;
  TSA_INLINE Vec<T> operator()(Vec<T> v, std::int64_t /*d*/ = 0) const { return v * factor; }
  // The same less `shift`.
  TSA_INLINE Vec<T> minus(Vec<T> v, Vec<T> shift) const { return fma(v, factor, -shift); }
};
template <typename T>
struct Unchanged {
  TSA_INLINE Vec<T> operator()(Vec<T> v, std::int64_t /*d*/ = 0) const { return v; }
  TSA_INLINE Vec<T> minus(Vec<T> v, Vec<T> shift) const { return v - shift; }
};

// Memory of one call: of the caller's stack for a small problem, where an aligned allocation would
// take as long as the arithmetic. A failed allocation throws, as any operator new.
class Scratch {
 public:
  explicit Scratch(std::int64_t bytes)
      : data_(bytes <= kStackBytes
                  ? stack_
                  : ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})) {}
  ~Scratch() {
    if (data_ != stack_) ::operator delete(data_, std::align_val_t{64});
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  static constexpr std::int64_t kStackBytes = 32768;
  alignas(64) char stack_[kStackBytes];
  void* data_;
};

// Cuts consecutive, 64-byte aligned arrays. With a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(std::int64_t n) {
    T* const result = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(n * static_cast<std::int64_t>(sizeof(T)), 64);
    return result;
  }
  std::int64_t used() const { return used_; }
  char* base() const { return base_; }

 private:
  char* base_;
  std::int64_t used_ = 0;
};

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
