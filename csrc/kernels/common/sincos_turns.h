#pragma once

#include <cmath>

#include "kernels/common/macros.h"

namespace torch_selfattn::kernels {

// sin and cos of 2 pi * turns, for angles of any size: whole turns and quarters are taken off in
// float64, where that is exact, and what is left, at most an eighth of a turn, is rounded to
// float32. Polynomials of Cephes (Moshier), |error| < 2^-23.
TSA_HOST_DEVICE void sincos_turns(double turns, float* sine, float* cosine) {
  const double part = turns - rint(turns);   // [-1/2, 1/2]
  const double quarters = rint(4.0 * part);  // -2 ... 2
  const float y = static_cast<float>((part - 0.25 * quarters) * 6.283185307179586);
  const float z = y * y;
  const float s = y + y * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  const float c =
      1.0f - 0.5f * z +
      z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const int quadrant = static_cast<int>(quarters) & 3;
  const float a = (quadrant & 1) != 0 ? c : s;
  const float b = (quadrant & 1) != 0 ? s : c;
  *sine = (quadrant & 2) != 0 ? -a : a;
  *cosine = quadrant == 1 || quadrant == 2 ? -b : b;
}

}  // namespace torch_selfattn::kernels
