#pragma once

#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>

namespace torch_selfattn::ops {

// Whether two sizes are known to be equal, without a guard on sizes that only exist at run time.
// Plain numbers, which is what eager calls have, are compared on the spot: the way over a SymBool
// is a call into libc10 each time, and a call of an operator compares some thirty sizes.
inline bool known_equal(const c10::SymInt& a, const c10::SymInt& b) {
  const auto x = a.maybe_as_int();
  const auto y = b.maybe_as_int();
  if (x.has_value() && y.has_value()) return *x == *y;
  return TORCH_GUARD_OR_FALSE(a.sym_eq(b));
}

}  // namespace torch_selfattn::ops
