// The fits of tanh (tools/fit_tanh.py) say of themselves how exact they are.
#include <algorithm>
#include <cmath>

#include "catch2_any.h"
#include "kernels/common/tanh_sines.h"

using torch_selfattn::kernels::kTanhSines;
using torch_selfattn::kernels::TanhSines;

TEST_CASE("fits of tanh have the errors that they state") {
  const TanhSines* before = nullptr;
  for (const TanhSines& fit : kTanhSines) {
    INFO(fit.terms << " terms up to " << fit.limit);
    constexpr int points = 20000;
    double largest = 0.0;
    double squares = 0.0;
    for (int n = 0; n <= points; ++n) {
      const double x = static_cast<double>(fit.limit) * n / points;
      double value = static_cast<double>(fit.slope) * x;
      double derivative = fit.slope;
      for (int m = 0; m < fit.terms; ++m) {
        const double frequency = fit.frequency[m];
        value += fit.amplitude[m] * std::sin(frequency * x);
        derivative += fit.amplitude[m] * frequency * std::cos(frequency * x);
      }
      const double tanh = std::tanh(x);
      largest = std::max(largest, std::abs(value - tanh));
      squares += std::pow(derivative - (1.0 - tanh * tanh), 2.0);
    }
    CHECK(largest < 1.02 * static_cast<double>(fit.error));
    CHECK(largest > 0.98 * static_cast<double>(fit.error));
    const double derivative_error = std::sqrt(squares / (points + 1));
    CHECK(derivative_error < 1.02 * static_cast<double>(fit.derivative_error));
    CHECK(derivative_error > 0.98 * static_cast<double>(fit.derivative_error));
    // In the order in which they are looked for; further out, less exact.
    if (before != nullptr && before->terms == fit.terms) {
      CHECK(before->limit < fit.limit);
      CHECK(before->error < fit.error);
    } else if (before != nullptr) {
      CHECK(before->terms < fit.terms);
    }
    before = &fit;
  }
}
