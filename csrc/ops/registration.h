#pragma once

#include <torch/library.h>

// A process holds one copy of the library: the first one registers the operators, any other stays
// silent. (PyTorch would end the process on a namespace that is defined twice, and let the kernels
// of one copy take the places of those of the other.) Python's import refuses the second copy:
// torch_selfattn/_load.py.

namespace torch_selfattn::ops {

// Whether the operators were there when this copy of the library was loaded.
bool is_second_copy();

}  // namespace torch_selfattn::ops

// NOLINTBEGIN(bugprone-macro-parentheses): names, which parentheses would break.

// The kernels of a dispatch key, as TORCH_LIBRARY_IMPL(torch_selfattn, key, m) {...}.
#define TORCH_SELFATTN_IMPL(key, m) \
  TORCH_SELFATTN_GUARDED(TORCH_LIBRARY_IMPL(torch_selfattn, key, library), m)
// The schemas; a fragment, since a namespace may be defined but once.
#define TORCH_SELFATTN_SCHEMAS(m) \
  TORCH_SELFATTN_GUARDED(TORCH_LIBRARY_FRAGMENT(torch_selfattn, library), m)

#define TORCH_SELFATTN_GUARDED(registration, m)                                 \
  static void C10_CONCATENATE(register_at_line_, __LINE__)(torch::Library & m); \
  registration {                                                                \
    if (!torch_selfattn::ops::is_second_copy()) {                               \
      C10_CONCATENATE(register_at_line_, __LINE__)(library);                    \
    }                                                                           \
  }                                                                             \
  static void C10_CONCATENATE(register_at_line_, __LINE__)(torch::Library & m)
// NOLINTEND(bugprone-macro-parentheses)
