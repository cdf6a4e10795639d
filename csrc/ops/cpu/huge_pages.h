#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torch_selfattn::ops {

// For a new, large tensor that is about to be filled: asks the system for pages of 2 MiB. A
// gradient of Lq Lk elements comes from fresh memory in most calls, and the faults of its small
// pages take longer than the stores. Only advice: where it is not followed nothing changes.
inline void prefer_huge_pages([[maybe_unused]] const at::Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr size_t page = size_t{2} << 20;
  if (!t.defined() || t.nbytes() < 2 * page) return;
  char* const data = static_cast<char*>(t.data_ptr());
  const size_t before = (page - reinterpret_cast<uintptr_t>(data) % page) % page;
  madvise(data + before, (t.nbytes() - before) / page * page, MADV_HUGEPAGE);
#endif
}

}  // namespace torch_selfattn::ops
