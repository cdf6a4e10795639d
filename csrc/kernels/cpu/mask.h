#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/common/attention_problem.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/rows.h"

// The mask tensor: what it adds to a row of scores, and a quick look whether it allows any pair, so
// that whole panels of keys can be left out.
namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA {

// Index of the mask's element for (b, h, i, key).
inline std::int64_t mask_offset(const AttentionProblem& p, std::int64_t b, std::int64_t h,
                                std::int64_t i, std::int64_t key) {
  return b * p.mask.stride[0] + h * p.mask.stride[1] + i * p.mask.stride[2] +
         key * p.mask.stride[3];
}

// The score, or NaN if it is not finite.
template <typename T>
TSA_INLINE Vec<T> finite_or_nan(Vec<T> score) {
  return fma(score, Vec<T>{}, score);
}

// score + bias in units of log2, at most `limit`; -inf where the bias is and nowhere else, NaN
// where the score is not finite.
template <typename T>
TSA_INLINE Vec<T> add_bias(Vec<T> score, Vec<T> bias, T limit) {
  const Vec<T> sum = fma(bias, splat(Math<T>::log2e), finite_or_nan<T>(score));
  const Vec<T> limited = at_least(splat(-Math<T>::max_score), at_most(splat(limit), sum));
  return bias == splat(-infinity<T>()) ? bias : limited;
}

// The score, or NaN if it is not finite, where a byte of the boolean mask is not 0, else -inf.
template <typename T>
TSA_INLINE Vec<T> keep_allowed(Vec<T> score, const std::uint8_t* mask) {
  return nonzero_bytes<T>(mask) ? finite_or_nan<T>(score) : splat(-infinity<T>());
}

// scores[n] of the keys from `key` of row (b, h, i) += mask, in units of log2: -inf where a pair is
// not allowed and nowhere else; a finite bias, be it the smallest number, hides nothing. Without
// Zeros::kSkip, the careful pass, what overflowed shows as NaN or inf, and has that pass run.
template <typename T>
inline void add_mask_row(const AttentionProblem& p, std::int64_t b, std::int64_t h, std::int64_t i,
                         std::int64_t key, std::int64_t n, Zeros zeros, T* scores) {
  constexpr int lanes = kLanes<T>;
  constexpr T largest = Math<T>::max_score;
  const std::int64_t stride = p.mask.stride[3];
  const std::int64_t offset = mask_offset(p, b, h, i, key);
  const std::int64_t whole = stride == 1 ? n / lanes * lanes : 0;
  if (p.mask_kind == MaskKind::kBool) {
    const auto* const from = static_cast<const std::uint8_t*>(p.mask.data) + offset;
    for (std::int64_t j = 0; j < whole; j += lanes) {
      store(scores + j, keep_allowed<T>(load(scores + j), from + j));
    }
    for (std::int64_t j = whole; j < n; ++j) {
      scores[j] = from[j * stride] != 0 ? scores[j] + T(0) * scores[j] : -infinity<T>();
    }
    return;
  }
  const T limit = zeros == Zeros::kSkip ? largest : infinity<T>();
  with_widened<T>(p.mask_dtype, [&]<DType dtype>() {
    const auto* const from =
        static_cast<const typename Storage<dtype>::type*>(p.mask.data) + offset;
    for (std::int64_t j = 0; j < whole; j += lanes) {
      store(scores + j, add_bias<T>(load(scores + j), load_widened<T, dtype>(from + j), limit));
    }
    for (std::int64_t j = whole; j < n; j += lanes) {
      const std::int64_t left = smaller<std::int64_t>(lanes, n - j);
      T bias[lanes] = {};
      load_elements<T, dtype>(p.mask.data, offset + j * stride, stride, left, bias);
      store_up_to(scores + j, add_bias<T>(load_up_to(scores + j, left), load(bias), limit), left);
    }
  });
}

// Has the mask's elements for the keys [key, key + n) of row (b, h, i) fetched, if there is such a
// row: the rows of a tile lie so far apart that the hardware would not see the next ones coming.
// (A function that only prefetches has to be inline: the compiler takes it for one without effect.)
TSA_INLINE void prefetch_mask_row(const AttentionProblem& p, std::int64_t b, std::int64_t h,
                                  std::int64_t i, std::int64_t key, std::int64_t n) {
  if (i >= p.query_length || p.mask.stride[3] != 1 || p.mask.stride[2] == 0) return;
  const std::int64_t size = p.mask_kind == MaskKind::kBool ? 1 : element_size(p.mask_dtype);
  const char* const from =
      static_cast<const char*>(p.mask.data) + mask_offset(p, b, h, i, key) * size;
  for (std::int64_t byte = 0; byte < n * size; byte += 64) __builtin_prefetch(from + byte);
}

// Whether the mask allows one of the n keys from element `offset` of it.
template <typename T>
inline bool allows_any(const AttentionProblem& p, std::int64_t offset, std::int64_t n) {
  const std::int64_t stride = p.mask.stride[3];
  if (stride == 0) n = 1;
  const std::int64_t whole = stride == 1 ? n / kLanes<T> * kLanes<T> : 0;
  if (p.mask_kind == MaskKind::kBool) {
    const auto* const from = static_cast<const std::uint8_t*>(p.mask.data) + offset;
    std::uint64_t any = 0;
    std::int64_t j = 0;
    for (; stride == 1 && j + 8 <= n; j += 8) {
      std::uint64_t eight;
      __builtin_memcpy(&eight, from + j, 8);
      any |= eight;
    }
    for (; j < n && any == 0; ++j) any |= from[j * stride];
    return any != 0;
  }
  bool any = false;
  with_widened<T>(p.mask_dtype, [&]<DType dtype>() {
    const auto* const from =
        static_cast<const typename Storage<dtype>::type*>(p.mask.data) + offset;
    for (std::int64_t j = 0; j < whole && !any; j += kLanes<T>) {
      any = any_lane<T>(load_widened<T, dtype>(from + j) != splat(-infinity<T>()));
    }
    for (std::int64_t j = whole; j < n && !any; ++j) {
      any = static_cast<T>(Storage<dtype>::widen(from[j * stride])) != -infinity<T>();
    }
  });
  return any;
}

constexpr int kMaskKeys = 256;  // in whole vectors

// What a mask makes of the scores of row r of some rows, of which it is asked for up to kMaskKeys
// keys at a time: for the vector of keys from the j-th of them relative(j, product, scaled, shift)
// is the score, masked, less the shift, and limited(j, score) the masked score. Hidden keys become
// -inf, and the smallest biases may; limited() keeps these apart. A bias is added before the shift
// is subtracted: it may cancel the score.
template <typename T>
struct NoMask {
  static constexpr bool kChanges = false;
  struct Row {
    template <typename Scale>
    TSA_INLINE Vec<T> relative(std::int64_t /*j*/, Vec<T> product, const Scale& scaled,
                               Vec<T> shift) const {
      return scaled.minus(product, shift);
    }
    TSA_INLINE Vec<T> limited(std::int64_t /*j*/, Vec<T> x) const { return x; }
  };
  Row row(std::int64_t /*r*/, std::int64_t /*key*/, int /*n*/) { return {}; }
};
// The rows of a mask whose keys lie side by side.
template <typename T, typename Element>
class MaskRows {
 public:
  static constexpr bool kChanges = true;

  // first: of row 0, its element for key 0.
  MaskRows(const Element* first, std::int64_t row_stride, std::int64_t keys)
      : first_(first), row_stride_(row_stride), keys_(keys) {}

 protected:
  // n elements from `key` on, zeros behind the last of a row.
  TSA_INLINE const Element* elements(std::int64_t r, std::int64_t key, int n) {
    const Element* const from = first_ + r * row_stride_ + key;
    // The same of the next keys: rows lie so far apart that the hardware does not see it coming.
    for (int x = 0; x < n; x += 64 / static_cast<int>(sizeof(Element))) {
      __builtin_prefetch(from + n + x);
    }
    if (key + n <= keys_ || n == 0) return from;
    const auto size = static_cast<std::size_t>(keys_ - key) * sizeof(Element);
    __builtin_memcpy(last_, from, size);
    __builtin_memset(reinterpret_cast<char*>(last_) + size, 0,
                     static_cast<std::size_t>(n) * sizeof(Element) - size);
    return last_;
  }

 private:
  const Element* first_;
  std::int64_t row_stride_, keys_;
  Element last_[kMaskKeys];
};
template <typename T>
struct BoolMaskRows : MaskRows<T, std::uint8_t> {
  using MaskRows<T, std::uint8_t>::MaskRows;
  struct Row {
    const std::uint8_t* elements;
    template <typename Scale>
    TSA_INLINE Vec<T> relative(std::int64_t j, Vec<T> product, const Scale& scaled,
                               Vec<T> shift) const {
      return limited(j, scaled.minus(product, shift));
    }
    TSA_INLINE Vec<T> limited(std::int64_t j, Vec<T> x) const {
      return nonzero_bytes<T>(elements + j) ? x : splat(-infinity<T>());
    }
  };
  TSA_INLINE Row row(std::int64_t r, std::int64_t key, int n) {
    return {this->elements(r, key, n)};
  }
};
template <typename T, DType dtype>
struct FloatMaskRows : MaskRows<T, typename Storage<dtype>::type> {
  using Element = typename Storage<dtype>::type;
  using MaskRows<T, Element>::MaskRows;
  struct Row {
    const Element* elements;
    template <typename Scale>
    TSA_INLINE Vec<T> relative(std::int64_t j, Vec<T> product, const Scale& scaled,
                               Vec<T> shift) const {
      const Vec<T> bias = load_widened<T, dtype>(elements + j);
      return fma(bias, splat(Math<T>::log2e), scaled(product)) - shift;
    }
    TSA_INLINE Vec<T> limited(std::int64_t j, Vec<T> x) const {
      return add_bias<T>(x, load_widened<T, dtype>(elements + j), infinity<T>());
    }
  };
  TSA_INLINE Row row(std::int64_t r, std::int64_t key, int n) {
    return {this->elements(r, key, n)};
  }
};

// body(mask) with the rows of the mask from query i on, whose keys lie side by side.
template <typename T, typename Body>
inline void with_mask_rows(const AttentionProblem& p, std::int64_t b, std::int64_t h,
                           std::int64_t i, const Body& body) {
  if (p.mask_kind == MaskKind::kNone) return body(NoMask<T>{});
  const std::int64_t offset = mask_offset(p, b, h, i, 0);
  if (p.mask_kind == MaskKind::kBool) {
    return body(BoolMaskRows<T>(static_cast<const std::uint8_t*>(p.mask.data) + offset,
                                p.mask.stride[2], p.key_length));
  }
  with_widened<T>(p.mask_dtype, [&]<DType dtype>() {
    using Element = typename Storage<dtype>::type;
    body(FloatMaskRows<T, dtype>(static_cast<const Element*>(p.mask.data) + offset,
                                 p.mask.stride[2], p.key_length));
  });
}

}  // namespace torch_selfattn::kernels::cpu::TSA_CPU_ISA
