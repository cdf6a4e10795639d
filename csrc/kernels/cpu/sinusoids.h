// Sines and cosines of positions, for positional_generic.h; compiled, as that is, once for each
// instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/common/parallel.h"
#include "kernels/common/positional_problem.h"

namespace torch_selfattn::kernels::cpu::TSA_INSTRUCTION_SET {

namespace {

// cos and sin of p f_i for integer p and all pairs i. With p = 32 a + b they are the product of
// e^(i 32 a f) and e^(i b f): 32 rows of the second serve all positions, and a row of the first
// serves 32 of them. Angles and products are float64: the error is that of rounding the angle,
// |angle| 2^-53, and of four more roundings. A value depends on p alone.
class Sinusoids {
 public:
  static constexpr std::int64_t kRows = 32;

  Sinusoids(const Frequencies& frequencies, std::int64_t pairs)
      : pairs_(pairs), frequency_(pairs), fine_(kRows * 2 * pairs) {
    for (std::int64_t i = 0; i < pairs; ++i) {
      const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(frequencies.dim);
      frequency_[i] = 1.0 / (frequencies.scaling * std::pow(frequencies.base, exponent));
    }
    for (std::int64_t b = 0; b < kRows; ++b) unit_row(b, fine_.data() + b * 2 * pairs);
  }

  // The calling thread keeps the last ones, since a model asks for the same again and again:
  // without that, a call for one position (a decoding step) would cost as much as one for 32.
  static std::shared_ptr<const Sinusoids> make(const Frequencies& f, std::int64_t pairs) {
    struct Last {
      Frequencies frequencies;
      std::shared_ptr<const Sinusoids> sinusoids;
    };
    static thread_local Last last;
    const Frequencies& g = last.frequencies;
    if (last.sinusoids == nullptr || last.sinusoids->pairs_ != pairs || g.dim != f.dim ||
        g.base != f.base || g.scaling != f.scaling) {
      auto made = std::make_shared<const Sinusoids>(f, pairs);
      if (pairs > kLargestKept) return made;
      last = {f, std::move(made)};
    }
    return last.sinusoids;
  }

  // cos, then sin, of all pairs at position p.
  void unit_row(std::int64_t p, double* row) const {
    for (std::int64_t i = 0; i < pairs_; ++i) {
      const double angle = static_cast<double>(p) * frequency_[i];
      row[i] = std::cos(angle);
      row[pairs_ + i] = std::sin(angle);
    }
  }

  // unit_row(p) from coarse_row = unit_row(coarse(p)).
  void combine(std::int64_t p, const double* coarse_row, double* __restrict row) const {
    const std::int64_t n = pairs_;
    const double* x = coarse_row;
    const double* y = fine_.data() + (p - coarse(p)) * 2 * n;
    for (std::int64_t i = 0; i < n; ++i) row[i] = x[i] * y[i] - x[n + i] * y[n + i];
    for (std::int64_t i = 0; i < n; ++i) row[n + i] = x[n + i] * y[i] + x[i] * y[n + i];
  }

  static std::int64_t coarse(std::int64_t p) { return p & ~(kRows - 1); }
  std::int64_t pairs() const { return pairs_; }

 private:
  static constexpr std::int64_t kLargestKept = 4096;  // pairs: 2 MiB

  std::int64_t pairs_;
  std::vector<double> frequency_;
  std::vector<double> fine_;
};

// The first factors of all positions that some ids name, if that are few rows for many ids.
class CoarseRows {
 public:
  CoarseRows(const Sinusoids& sinusoids, const RowProblem& p, const Parallel& parallel) {
    if (p.positions.ids == nullptr) return;
    const std::int64_t samples = p.positions.per_sample() ? p.batch : 1;
    std::int64_t last = first_ = p.positions.at(0, 0);
    for (std::int64_t b = 0; b < samples; ++b) {
      for (std::int64_t l = 0; l < p.length; ++l) {
        first_ = std::min(first_, p.positions.at(b, l));
        last = std::max(last, p.positions.at(b, l));
      }
    }
    first_ = Sinusoids::coarse(first_);
    width_ = 2 * sinusoids.pairs();
    // In double: ids may lie anywhere in the range of int64.
    const double rows = (static_cast<double>(last) - static_cast<double>(first_)) / kRows + 1;
    if (rows > static_cast<double>(samples * p.length) / 2 || rows * width_ > kLargest) return;
    rows_.resize(static_cast<std::int64_t>(rows) * width_);
    parallel.run(static_cast<std::int64_t>(rows), [&](std::int64_t row, int) {
      sinusoids.unit_row(first_ + row * kRows, rows_.data() + row * width_);
    });
  }

  // Null if there is no such table.
  const double* row(std::int64_t p) const {
    return rows_.empty() ? nullptr : rows_.data() + (p - first_) / kRows * width_;
  }

 private:
  static constexpr std::int64_t kRows = Sinusoids::kRows;
  static constexpr std::int64_t kLargest = 1 << 19;  // numbers: 4 MiB

  std::int64_t first_ = 0;
  std::int64_t width_ = 0;
  std::vector<double> rows_;
};

// Walks over positions; neighbours share their first factor. One per task.
class SinusoidCursor {
 public:
  explicit SinusoidCursor(const Sinusoids& all, const CoarseRows* coarse_rows = nullptr)
      : all_(all), coarse_rows_(coarse_rows), rows_(4 * all.pairs()) {}

  // cosine(), sine() are then those of position p, until the next call.
  void move_to(std::int64_t p) {
    const double* coarse_row = coarse_rows_ != nullptr ? coarse_rows_->row(p) : nullptr;
    if (coarse_row == nullptr) {
      coarse_row = rows_.data();
      if (!has_coarse_ || coarse_ != Sinusoids::coarse(p)) {
        has_coarse_ = true;
        coarse_ = Sinusoids::coarse(p);
        all_.unit_row(coarse_, rows_.data());
      }
    }
    all_.combine(p, coarse_row, rows_.data() + 2 * all_.pairs());
  }
  const double* cosine() const { return rows_.data() + 2 * all_.pairs(); }
  const double* sine() const { return rows_.data() + 3 * all_.pairs(); }

 private:
  const Sinusoids& all_;
  const CoarseRows* coarse_rows_;
  std::vector<double> rows_;  // the first factor, and the product
  std::int64_t coarse_ = 0;
  bool has_coarse_ = false;
};

}  // namespace

}  // namespace torch_selfattn::kernels::cpu::TSA_INSTRUCTION_SET
