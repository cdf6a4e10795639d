#pragma once

#include <torch_selfattn/export.h>

namespace torch_selfattn {

struct BuildInfo {
  const char* version;
  const char* torch_version;  // of the torch headers it was built with, e.g. "2.14.1"
  bool cuda;                  // CUDA kernels are compiled in
  const char* cuda_archs;     // e.g. "80-real 90a-real 90-virtual", empty without CUDA
};

TORCH_SELFATTN_API BuildInfo build_info();

namespace detail {
// `ld --as-needed` drops a library nobody refers to, and with it the static initialisers that
// register the operators. This reference keeps it; without `used` the compiler removes it.
[[gnu::used]] inline BuildInfo (*const keep_library)() = &build_info;
}  // namespace detail

}  // namespace torch_selfattn
