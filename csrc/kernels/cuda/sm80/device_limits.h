#pragma once

#include <cstdint>

namespace torch_selfattn::kernels::cuda::sm80 {

// What a GPU has of that which kernels may find too little of.
struct DeviceLimits {
  int capability_major = 0;
  std::int64_t shared_bytes_per_block = 0;  // the most that a kernel may ask for
};

}  // namespace torch_selfattn::kernels::cuda::sm80
